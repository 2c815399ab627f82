"""What a terminal is shown of names that others gave."""

from aiirwkv.terminal import how_far, outcome, table, title
from aiirwkv.types import Job

NASTY = "a\x1b[2Jb\r\nc\u202ed.txt"


def job(name: str, **fields: object) -> Job:
    return Job("1", "index", request={"sources": [{"name": name}]}, **fields)  # type: ignore[arg-type]


def test_control_characters_are_replaced() -> None:
    assert title(job(NASTY)) == "index a�[2Jb  c�d.txt"
    assert (
        outcome(job("x", state="failed", error=f"cannot read\n{NASTY}"))
        == f"failed: cannot read {title(job(NASTY))[6:]}"
    )
    documents = [{"name": NASTY, "state": "ready"}, {"name": "b", "state": "failed", "reason": NASTY}]
    done = [outcome(job("x", result={"documents": documents[:n]})) for n in (1, 2)]
    assert done[0] == "ready"
    assert all(text.isprintable() for text in done)
    assert how_far(job("x", note=NASTY)).isprintable()


def test_long_names_keep_their_beginning_and_end() -> None:
    shown = title(job(f"{'folder/' * 60}report.pdf"))
    assert len(shown) == 48 and shown.startswith("index folder/") and shown.endswith("report.pdf") and "…" in shown
    assert len(title(job("x" * 400), 36)) == 36
    assert title(job("short.txt")) == "index short.txt"
    assert how_far(job("y" * 400, note="y" * 400)) == ""


def test_a_table_has_one_line_per_row() -> None:
    shown = table([[title(job(NASTY)), "1"], [title(job("n" * 300)), NASTY]], ["job", "state"]).split("\n")
    assert len(shown) == 3 and all(line.isprintable() for line in shown)
    assert {line.index(word) for line, word in zip(shown, ("STATE", "1", "a�"), strict=True)} == {50}
