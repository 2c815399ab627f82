"""What is said to models and to people. Braces are replaced by plain substitution of known names, nothing else."""

from __future__ import annotations

import re

__all__ = ["fill", "language", "say"]

_TEXTS = {
    "en": {
        "sources": "Answer the question from the numbered documents only, in the language of the question. After "
        "each sentence name the documents it rests on, like [1]. If they do not answer it, write exactly: "
        "{refusal}",
        "free": "Answer the question, in its language. Where a sentence rests on a numbered document, name it after "
        "the sentence, like [1].",
        "below": "Answer from the text above only, in the language of the question. If it does not answer it, write "
        "exactly: {refusal}\n{question}",
        "below_free": "Answer the question, in its language. The text above may help.\n{question}",
        "refusal": "The documents do not say.",
        "condense": "Rewrite the last question so that it can be understood without the conversation. Write only the "
        "question.\n\n{conversation}\n\nLast question: {question}",
        "refused": "The sources do not answer this. The closest passage says: “{quote}” [1]",
        "nothing": "The sources do not answer this: nothing was found{where}.",
        "quoted": "The model gave no answer that stands in the sources. The passage that fits best says: “{quote}” [1]",
        "alone": "Not from the sources: ",
    },
    "zh": {
        "sources": "只根据编号的文档，用问题的语言回答问题。每句话之后用 [1] 这样的编号注明所依据的文档。"
        "如果文档没有答案，只写：{refusal}",
        "free": "用问题的语言回答问题。如果某句话依据编号的文档，在句后用 [1] 这样的编号注明。",
        "below": "只根据上文，用问题的语言回答问题。如果上文没有答案，只写：{refusal}\n{question}",
        "below_free": "用问题的语言回答问题，可以参考上文。\n{question}",
        "refusal": "文档中没有说明。",
        "condense": "改写最后一个问题，使它不看对话也能理解。只写问题。\n\n{conversation}\n\n最后一个问题：{question}",
        "refused": "资料没有回答这个问题。最接近的段落写道：“{quote}” [1]",
        "nothing": "资料没有回答这个问题：没有找到任何内容{where}。",
        "quoted": "模型没有给出能在资料中找到的答案。最符合的段落写道：“{quote}” [1]",
        "alone": "以下不是来自资料：",
    },
}
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_KANA = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")


def language(text: str) -> str:
    """zh for Chinese, en for everything else: the languages that we speak ourselves."""
    chinese = len(_CHINESE.findall(text))
    return "zh" if chinese * 3 > len(text) and not _KANA.search(text) else "en"


def say(name: str, asked: str, /, **words: str) -> str:
    """One of our texts, in the language of what was asked."""
    return fill(_TEXTS[language(asked)][name], **words)


def fill(form: str, /, **words: str) -> str:
    """Replace {name} by its word, once: what the words hold is not looked at again."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), form)
