"""What a prompt asks for, in the words of counting: "three red apples and a dog" is 3 of "red apple" and 1 of "dog".

A noun phrase begins at a number or an article. One of several objects ends at its first plural, one of a single object
at a preposition, a conjunction, a verb or a mark. `singular` knows the regular plurals, the frequent irregular ones and
those of GenEval's prompts ("two sandwichs", "two buses"); packages for this exist, but with an optional one the same
prompt would be read differently from machine to machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


def _words(text: str) -> list[str]:
    return text.split()


_ONES = _words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
_UNITS = {word: i for i, word in enumerate([*_ONES, "seventeen", "eighteen", "nineteen"])}
_TENS = {word: 10 * i for i, word in enumerate(_words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}
_NUMBERS = {**_UNITS, **_TENS, "no": 0, "single": 1}
_ARTICLES = ("a", "an", "another")
_TIMES = {"dozen": 12, "dozens": 12, "hundred": 100, "pair": 2, "pairs": 2, "couple": 2, "couples": 2, "trio": 3}
_VAGUE = _words("lot lots few bunch group number variety set crowd herd flock row line pile stack collection")
_PICTURES = _words(
    "photo photograph picture image painting drawing illustration sketch render rendering shot close-up closeup view "
    "scene portrait snapshot depiction"
)
_STOP = {
    *_words("and or but nor with without of on in at to from by for into onto inside outside under underneath beneath"),
    *_words("below above over atop beside besides next near behind before after between among amid around through"),
    *_words("across along against off up down left right front top bottom as than while where who whom whose which"),
    *_words("the this that these those its his her their each every some any all not only just there it they he she"),
    *_words("is are was were be being been has have had sit sits stand stands lie lies run runs jump jumps fly flies"),
    *_words("hold holds wear wears rest rests perched parked seated placed dressed filled covered made painted"),
}
_MAY_BEGIN = _words("left right front top bottom")  # of the words above: "a top hat"
_NOUNS_IN_ING = _words(
    "building painting ring earring string wing king ceiling swing spring duckling dumpling pudding wedding parking "
    "railing awning clothing icing frosting sibling viking herring"
)
_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"},
    **{"feet": "foot", "teeth": "tooth", "oxen": "ox", "cacti": "cactus", "octopi": "octopus", "dice": "die"},
    **{"fungi": "fungus", "snowmen": "snowman", "policemen": "policeman", "firemen": "fireman", "axes": "axe"},
    **{f"{stem}ves": f"{stem}f" for stem in _words("lea shel wol loa hal cal el scar thie hoo shea")},
    **{f"{stem}ves": f"{stem}fe" for stem in _words("kni wi li")},
    **{f"{noun}s": noun for noun in _words("tie pie movie cookie zombie brownie hoodie smoothie selfie magpie pixie")},
    **{f"{noun}s": noun for noun in _words("shoe toe canoe hoe oboe horseshoe")},
    **{f"{noun}es": noun for noun in _words("bus gas lens atlas octopus cactus walrus virus canvas scissors skis")},
}
_SAME = _words("sheep fish deer aircraft moose bison salmon squid shrimp scissors skis binoculars")
_ENDS_IN_S = _words("bus gas lens atlas canvas christmas sports tennis iris")
_WORD = re.compile(r"\w[\w'-]*|[^\w\s]")


@dataclass(frozen=True)
class Group:
    """Objects of one kind that a prompt names.

    Attributes:
        name: of one of them, with its adjectives.
        count: how many.
        exact: whether a number was said; after an article more than one may be there.
        before: the words since the group before it, as a line.
    """

    name: str
    count: int
    exact: bool
    before: str = ""


@lru_cache(maxsize=4096)
def groups(prompt: str) -> tuple[Group, ...]:
    """The numbered noun phrases of a prompt, in order, without what says that it is a picture ("a photo of")."""
    words = _WORD.findall(prompt.lower())
    found, at, since = [], 0, 0
    while at < len(words):
        number = _number(words, at)
        if number is None:
            at += 1
            continue
        count, exact, begin = number
        end = _end(words, begin, count)
        phrase = words[begin:end]
        if phrase and phrase[0] != "few" and phrase[-1] not in _PICTURES and phrase[-1] not in _VAGUE:
            name = " ".join([*phrase] if count == 1 and not exact else [*phrase[:-1], singular(phrase[-1])])
            found.append(Group(name, count, exact, " ".join(words[since:at])))
            since = end
        at = max(end, at + 1)
    return tuple(found)


def _number(words: list[str], at: int) -> tuple[int, bool, int] | None:
    """The number at a word, whether it is exact, and where what it counts begins; None where there is none."""
    word, exact = words[at], True
    if word == "half" and words[at + 1 : at + 3] == ["a", "dozen"]:
        return 6, True, at + 3
    if word in _ARTICLES:
        count, exact = 1, False
    elif word in _NUMBERS:
        count = _NUMBERS[word]
        if word in _TENS and _UNITS.get("".join(words[at + 1 : at + 2]), 0) in range(1, 10):
            at, count = at + 1, count + _UNITS[words[at + 1]]
    elif re.fullmatch(r"[0-9]{1,3}", word):
        count = int(word)
    elif "-" in word and word.split("-")[0] in _TENS and word.split("-")[1] in _UNITS:
        count = _TENS[word.split("-")[0]] + _UNITS[word.split("-")[1]]
    else:
        return None
    at += 1
    if at < len(words) and words[at] in _TIMES:
        multiplied = words[at] in ("dozen", "dozens", "hundred") or words[at + 1 : at + 2] == ["of"]
        if multiplied:
            count, exact, at = count * _TIMES[words[at]], True, at + 1
    if words[at : at + 1] == ["of"] and exact:  # "a pair of", "one of the"
        at += 1
        at += words[at : at + 1] == ["the"]
    return count, exact, at


def _end(words: list[str], begin: int, count: int) -> int:
    """Where the noun phrase that begins at a word ends."""
    for at in range(begin, len(words)):
        word = words[at]
        stop = word in _STOP and not (at == begin and word in _MAY_BEGIN)
        verb = word.endswith("ing") and at > begin and word not in _NOUNS_IN_ING
        if stop or verb or not word[0].isalnum() or _number(words, at):
            return at
        if count != 1 and _plural(word):
            return at + 1
    return len(words)


def _plural(word: str) -> bool:
    regular = word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in _ENDS_IN_S
    return regular or word in _IRREGULAR or word in _SAME


def singular(noun: str) -> str:
    """One of what a plural noun names, as English usually forms it; a noun that is no plural stays."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun in _SAME or not _plural(noun):
        return noun
    if noun.endswith("men") or len(noun) < 3:
        return noun
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")):
        return noun[:-2]
    return noun[:-1]
