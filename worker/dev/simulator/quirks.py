"""The variations of the wire that have been documented or seen; each is a switch of one workspace."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quirks:
    """How one workspace's answers are written; the defaults are the current documented form.

    `null_groups` off leaves unattributed usage out of grouped answers (sums then fall short of the total).
    `gzip` None means: when asked for and the body is big. `paginated` cuts every list to its first half and
    adds `has_more` and `next_cursor`.
    """

    credits_column: str = "credits_used"
    units: str | None = "credits"
    string_numbers: bool = False
    time_form: str = "iso"
    label_columns: bool = True
    zero_fill: bool = False
    null_groups: bool = True
    early_bucket: bool = False
    product_dashes: bool = False
    extra_fields: bool = False
    extra_measures: bool = False
    unknown_enums: bool = False
    omit_user_workspace_id: bool = False
    old_key_shape: bool = False
    gzip: bool | None = None
    shuffle_columns: bool = False
    cost_refusal_status: int = 400
    scope_form: int = 401
    paginated: bool = False
