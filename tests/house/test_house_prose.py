"""Code decides by codes, roles and types: it reads no prose."""

from __future__ import annotations

import house_prose as prose
import house_source as house
import pytest


def ids(path):
    return str(path.relative_to(house.ROOT))


@pytest.mark.parametrize("path", house.files(*house.SHIPPED), ids=ids)
def test_nothing_hangs_on_what_people_read(path):
    assert not [f"{house.where(path, line)} {what}" for line, what in prose.findings(path)]


@pytest.mark.parametrize(
    "code",
    [
        "'left alone by' in step.note",
        "step.note != NO_MODULE",
        "layer.skip_reason == other",
        "'no ' + name not in r.text",
        "reason.text.startswith('no')",
        "str(layer.skip_reason).startswith('embedding')",
        "'raised' in str(verdict.reasons[0])",
        "choice.reasons[0].lower().endswith('it')",
        "pattern.search(scheme.summary)",
        "[x for x in steps if x.note == '']",
    ],
)
def test_the_rule_can_fail(tmp_path, code):
    bad = tmp_path / "bad.py"
    bad.write_text(f"{code}\n", encoding="utf-8")
    assert [line for line, _ in prose.findings(bad)] == [1]


@pytest.mark.parametrize(
    "code",
    [
        "layer.skip_reason.code is SkipCode.ROLE",
        "layer.skip_reason is None",
        "if step.note:\n    print(step.note)",
        "text == 'auto'",
        "choice.status == Status.NATIVE",
    ],
)
def test_the_rule_lets_codes_pass(tmp_path, code):
    good = tmp_path / "good.py"
    good.write_text(f"{code}\n", encoding="utf-8")
    assert not list(prose.findings(good))
