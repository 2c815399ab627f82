"""The terms of texts and queries, and the fusion of rankings."""

import pytest
from aiirwkv_knowledge.fusion import fuse
from aiirwkv_knowledge.keywords import expression, terms
from aiirwkv_knowledge.languages import unreadable


def test_chinese_gives_pairs_and_english_words() -> None:
    assert terms("RWKV-7 微调文档") == ["rwkv", "7", "微调", "调文", "文档", "档"]
    assert terms("ＲＷＫＶ Straße") == ["rwkv", "strasse"]
    assert terms("東京タワー") == ["東京", "京タ", "タワ", "ワー", "ー"]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("文档", '"文档"'),
        ("猫", '"猫"*'),
        ("When does the museum open?", '"museum" OR "open"'),
        ("who is it", '"who" OR "is" OR "it"'),
        ('" OR NEAR(a b) *', '"or" OR "near" OR "a" OR "b"'.replace('"or" OR ', "").replace(' OR "a"', "")),
        ("?!", ""),
    ],
)
def test_queries(query: str, wanted: str) -> None:
    assert expression(query) == wanted


def test_fusion_by_hand() -> None:
    scores = fuse([["a", "b", "c"], ["b", "d"]])
    assert list(scores) == ["b", "a", "d", "c"]
    assert scores["b"] == pytest.approx(61 / 2 * (1 / 62 + 1 / 61))
    assert scores["a"] == pytest.approx(61 / 2 * (1 / 61))


def test_a_leg_without_hits_takes_no_part() -> None:
    assert fuse([["a", "b"], []]) == fuse([["a", "b"]])
    assert fuse([["a", "b"]])["a"] == 1.0
    assert fuse([[], []]) == {}
    assert list(fuse([["a"], ["b"]], [1.0, 2.0])) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "languages", "script"),
    [
        ("什么是知识库？", ["en"], "CJK"),
        ("什么是知识库？", ["en", "zh-Hans"], ""),
        ("什么是知识库？", [], ""),
        ("什么是知识库？", ["*"], ""),
        ("RWKV-7 微调", ["en"], "CJK"),
        ("the word 文 in a long English sentence", ["en"], ""),
        ("Что такое музей?", ["en", "zh"], "CYRILLIC"),
        ("Wie spät ist es?", ["en"], ""),
        ("東京タワー", ["zh"], "KATAKANA"),
        ("123 ?!", ["en"], ""),
    ],
)
def test_scripts(text: str, languages: list[str], script: str) -> None:
    assert unreadable(text, languages) == script
