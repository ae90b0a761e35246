import pytest

from torchtitan_lite.config.statements import statements

TEXT = """\
a.b = 1 # one
[x]
# said

list = [
  1, # first
  2,
]
text = '''
[no header]
k = 1
'''
inline = { p = 1, q = { r = "=" } }

[ x . "y z" ]
k = 1
[[x.tables]]
k = 2
"""


def test_statements_are_all_lines_in_order_with_what_they_set() -> None:
    found = list(statements(TEXT))
    assert "\n".join(line for each in found for line in each.lines) == TEXT
    assert [(each.kind, each.section, each.leaves) for each in found if each.kind not in ("blank", "comment")] == [
        ("pair", "", {"a.b": 1}),
        ("header", "x", {}),
        ("pair", "x", {"list": [1, 2]}),
        ("pair", "x", {"text": "[no header]\nk = 1\n"}),
        ("pair", "x", {"inline.p": 1, "inline.q.r": "="}),
        ("header", "x.y z", {}),
        ("pair", "x.y z", {"k": 1}),
        ("header", "x.tables", {}),
        ("pair", "x.tables", {"k": 2}),
    ]


@pytest.mark.parametrize("letter", ["\u2028", "\x85"])
def test_only_a_line_feed_ends_a_line(letter: str) -> None:
    (found, last) = statements(f"k = 'a{letter}b'\n")
    assert found.leaves == {"k": f"a{letter}b"}
    assert last.kind == "blank"
