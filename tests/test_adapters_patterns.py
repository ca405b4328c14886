"""Regular expressions of an adapter's config: what ``re`` answers, in bounded time whatever the pattern is."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polylora.adapters.patterns import Pattern

Q = "model.layers.1.self_attn.q_proj"
# As unsloth writes it for a vision model, and ms-swift for the language part of one.
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|"
    r"attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
SWIFT = r"^(language_model|model)(?!.*(lm_head|output|emb|wte|shared)).*"
WRITTEN = {
    r"model\.layers\.(0|1|2)\.self_attn\.(q|v)_proj": True,
    r".*\.(q_proj|v_proj)": True,
    r".*(q|k|v)_proj$": True,
    r"^model\.layers\.\d+\..*q_proj$": True,
    r".*\.layers\.[0-9]+\..*q_proj": True,
    r"model\.(?:layers)\.[^.]+\.\w+\.q_proj": True,
    r"(?!.*visual).*(?:q_proj|k_proj|v_proj)": True,
    r"(?!.*self_attn).*_proj": False,
    r".*(?<!mlp)\.(q_proj|up_proj)": True,
    r"(\w+\.)+q_proj": True,
    r"q_proj": False,
    "|".join(rf"model\.layers\.{n}\.self_attn\.q_proj" for n in range(80)): True,
    UNSLOTH: True,
    SWIFT: True,
}
HOSTILE = [
    ".?" * 24 + "Z",
    ".{0,900}" * 8 + "Z",
    "(a+)+b",
    "(a|b.*)*c",
    r"(\w+\.)+x",
    ".*a.*b.*c.*d.*e",
    "(x{1,9}){1,9}",
    ".*" * 200 + "Z",
    "(a|a)" * 200 + "Z",
    "(a|aa)+" * 20 + "Z",
    "((a?){900}){900}Z",
    "(((a*)*)*)*Z",
    "(((a.)*b?)*a)*Z",
    "(?=.*a.*a.*Z)" * 50,
    "(?!(?!(?!a*b)*Z)*)",
    "(?:(?=a*)a)*Z",
    "(" * 200 + "a*" + ")*" * 200,
    r"(a*)\1Z",
    "a" * 5000,
]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_patterns_as_people_write_them(pattern):
    assert Pattern(pattern).matches(Q) == WRITTEN[pattern] == bool(re.fullmatch(pattern, Q))
    assert Pattern(pattern).matches_tail(Q) == bool(re.match(rf"(.*\.)?({pattern})$", Q))


def seconds(pattern: Pattern, path: str) -> float:
    start = time.process_time()
    pattern.matches(path)
    pattern.matches_tail(path)
    return time.process_time() - start


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("path", ["a" * 300, "a." * 150])
def test_no_accepted_pattern_is_slow(pattern, path):
    try:
        compiled = Pattern(pattern)
    except (re.error, RecursionError):
        return
    assert min(seconds(compiled, path) for _ in range(3)) < 0.05


@pytest.mark.parametrize("pattern", [r"(a*)\1", "(?i)a", "(?i:a)", "(", "a" * 5000, "(" * 60 + "a" + ")" * 60])
def test_what_is_refused(pattern):
    with pytest.raises(re.error):
        Pattern(pattern)


def repeated(body: str, kind: str) -> str:
    return f"(?:{body}){kind}"


ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[^a.]", "[a-c1]", r"[^\W1]", r"\b", "^", "$", ""])
KINDS = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}", "{2,}", "??"])
PATTERNS = st.recursive(
    st.lists(ATOMS, max_size=4).map("".join) | st.builds(repeated, st.sampled_from(["a", ".", r"\w"]), KINDS),
    lambda inner: (
        st.builds(repeated, inner, KINDS)
        | st.builds("({}|{})".format, inner, inner)
        | st.builds("{}{}".format, inner, inner)
        | st.builds("(?={})".format, inner)
        | st.builds("(?!{}){}".format, inner, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(pattern=PATTERNS, path=st.text("ab.1_", min_size=1, max_size=8))
def test_equals_re(pattern, path):
    re.compile(pattern)
    try:
        compiled = Pattern(pattern)
    except re.error as error:
        assert "within repeats" in str(error)
        return
    assert compiled.matches(path) == bool(re.fullmatch(pattern, path))
    assert compiled.matches_tail(path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


@settings(max_examples=100, deadline=None)
@given(
    pattern=st.lists(PATTERNS, min_size=1, max_size=30).map("".join), path=st.text("ab.1_", min_size=300, max_size=300)
)
def test_any_accepted_pattern_is_fast(pattern, path):
    try:
        compiled = Pattern(pattern)
    except re.error:
        return
    assert min(seconds(compiled, path) for _ in range(3)) < 0.05
