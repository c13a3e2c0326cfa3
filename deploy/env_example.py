"""Write `env.example` from the settings: `python -m deploy.env_example`."""  # noqa: INP001 - no package of the product

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Final

from worker.settings import catalogue

FILE: Final = Path(__file__).with_name("env.example")
HEAD: Final = """\
# Every setting of Rollcall with its default; a line that is empty or commented out keeps the default.
# A name that begins with ROLLCALL_ and is not listed here stops the start: typing errors do not pass.
# A secret may stand in a file instead: set <NAME>_FILE to its path, and leave <NAME> out.
# Written by `python -m deploy.env_example`.
"""


def render() -> str:
    """Give the text of the file: what has a default is commented out."""
    lines = [HEAD]
    for setting in catalogue():
        about = setting.description + (" (secret)" if setting.secret else "")
        lines += [f"# {line}" for line in textwrap.wrap(about, 110)]
        lines.append(f"{'' if setting.secret else '#'}{setting.name}={setting.default}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"{FILE.name}\n")
