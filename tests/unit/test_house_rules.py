"""House rules that no linter knows: what tests say, how long modules get, why a rule is set aside."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from uuid import UUID

import pytest
from pydantic import BaseModel

from schemas import messages

ROOT = Path(__file__).parents[2]
PRODUCT = ("worker", "tasks", "schemas")
MOST_LINES = 350
DIRECTIVE = re.compile(
    r"#\s*(?:noqa\b(?::\s*(?P<rules>[A-Z]+\d+(?:,\s*[A-Z]+\d+)*))?|type:\s*ignore(?:\[(?P<codes>[\w, -]+)\])?)"
)
WORDS = ("TODO", "FIXME", "NotImplementedError")
MESSAGES = [
    kind
    for _, kind in inspect.getmembers(messages, inspect.isclass)
    if issubclass(kind, BaseModel) and kind.__module__ == messages.__name__
]


def modules(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def comments(file: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_every_test_says_what_it_proves() -> None:
    """Each test function has a docstring: the rule it proves."""
    silent = [
        f"{name(file)}:{node.lineno} {node.name}"
        for file in modules("tests")
        if file.name.startswith("test_")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_unit_tests_do_not_sleep() -> None:
    """A unit test passes the time instead of waiting for it."""
    call = re.compile(r"\bsleep" + r"\(")
    assert [name(file) for file in modules("tests/unit") if call.search(file.read_text(encoding="utf-8"))] == []


def test_modules_stay_short() -> None:
    """A module that nobody can read at once is two."""
    lengths = {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in modules(*PRODUCT)}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_whoever_sets_a_rule_aside_says_why() -> None:
    """A `noqa` and a `type: ignore` name the rule and give a reason on the same line."""
    silent = []
    for file in modules(*PRODUCT, "tests", "deploy"):
        for line, comment in comments(file):
            found = list(DIRECTIVE.finditer(comment))
            named = all(directive["rules"] or directive["codes"] for directive in found)
            if found and not (named and re.search(r"[A-Za-z]{2}", DIRECTIVE.sub("", comment))):
                silent.append(f"{name(file)}:{line} {comment}")
    assert silent == []


@pytest.mark.parametrize("comment", ["# noqa", "# noqa: S608", "# type: ignore", "# type: ignore[misc] # noqa: S1"])
def test_a_directive_without_a_reason_is_seen(comment: str) -> None:
    """The rule above finds what it looks for, and takes both ways of giving a reason."""
    assert DIRECTIVE.search(comment)
    assert not re.search(r"[A-Za-z]{2}", DIRECTIVE.sub("", comment))
    for reason in (" - a constant", "  # a constant"):
        assert re.search(r"[A-Za-z]{2}", DIRECTIVE.sub("", comment + reason))


def test_nothing_is_left_for_later() -> None:
    """No module of the product holds a note to come back, or a function that is not written yet."""
    found = [
        f"{name(file)}: {word}"
        for file in modules(*PRODUCT)
        for word in WORDS
        if word in file.read_text(encoding="utf-8")
    ]
    assert found == []


def is_small(annotation: Any) -> bool:
    """Tell whether a field can hold no more than an id, a word or a constant."""
    if get_origin(annotation) is Annotated:
        return is_small(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return is_small(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return True
    return annotation in {UUID, str} or (isinstance(annotation, type) and issubclass(annotation, Enum))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda kind: kind.__name__)
def test_celery_messages_hold_ids_only(message: type[BaseModel]) -> None:
    """No message can carry a key or a payload: ids, words of ours and an actor, nothing unknown."""
    assert message.model_config["extra"] == "forbid"
    for field_name, field in message.model_fields.items():
        assert field_name in {"v", "kind", "actor"} or field_name.endswith(("_id", "_ids")), field_name
        assert is_small(field.annotation), field_name
        if field.annotation is str:
            assert any(getattr(rule, "max_length", None) for rule in field.metadata), field_name
