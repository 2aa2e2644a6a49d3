"""Raw caption -> the words that the COCO caption metrics compare.

Behaves like Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase` followed by coco-caption's punctuation list,
through which all published scores (and LAVIS's) go. That is a Java program; its behaviour was observed and is described
here as rules of our own. A test compares the two where Java is installed. One difference stays: Java reads all captions
as one stream, and now and then the next one decides about a last period; here every caption stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)

# \w without the underscore and without signs that only look like digits (superscripts, fractions, circled numbers)
_LETTER = (
    r"(?:[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b\u2460-\u24ff\u2776-\u2793]|[\u0300-\u036f\u00ad]"
    r"|&[aeiouAEIOU](?:acute|grave|uml);)"
)
_ALNUM = rf"(?:{_LETTER}|\d)"
_APOSTROPHE = r"(?:['\u2019\u0092]|&apos;)"
_WORD_APOSTROPHE = rf"(?:{_APOSTROPHE}|[`\u2018\u201b\u0091])"  # inside a word also the wrong ones
_CLITIC = rf"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_NOT = rf"n{_WORD_APOSTROPHE}t"
_NO_LETTER = r"(?![A-Za-z])"

_DOTTED_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_ELISION = rf"(?:[dDoOlL]{_WORD_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_HYPHENATED = rf"{_ELISION}(?:[-_\u058a\u2010\u2011]{_ELISION})*"  # twin-hulled, o'clock
_HYPHENATED_DOTTED = r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+"  # U.S.-based
_INITIALS = r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"  # AT&T
_NAME = rf"(?-i:[A-HJ-XZn]){_WORD_APOSTROPHE}{_LETTER}{{2}}{_ALNUM}*"  # O'Neill, rock n'roll
_NUMBER = r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"
_SPACE = "[ \u00a0]"

# Abbreviations keep their period. Dates, places and firms keep it also in front of a short word ("Inc.x"), titles do
# not; the third kind needs a capital, the fourth a number behind it.
_NAME_ABBREVIATION = r"""
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed\.d esq est etc ext feb
    fla fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn ph\.d plc
    p?p?t[ye]s? rd rt sept? seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wisc? wyo
"""
_TITLE_ABBREVIATION = """
    adj adm adv alex assoc asst attys? ave brig capt cf cie cmdr col comdr cpl dept det drs? elec ens ft gen govs? hon
    insp invt jos lieut lt maj messrs mfg mlle mme mrs? ms msgr mt mtg natl pfc ph pres profs? pvt reps? rev sens? sfc
    sgt spc ste? supts? treas vs wm
"""
_CAPITAL_ABBREVIATION = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBER_ABBREVIATION = "art ca figs? nos? op pp prop"

_SPLIT_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3}
_PARENTHESES = {"(": "-lrb-", ")": "-rrb-"}
_SPELLING = _PARENTHESES | {
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&apos;": "'",
    "\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$", "\u0080": "$",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "\u2018": "`", "\u201b": "`", "\u2039": "`", "\u0091": "`", "\u2019": "'", "\u203a": "'", "\u0092": "'",
    "\u201c": "``", "\u00ab": "``", "\u0093": "``", "\u201d": "''", "\u00bb": "''", "\u0094": "''",
}  # fmt: skip
_SPELLED = re.compile("|".join(map(re.escape, _SPELLING)))
_KEPT_SYMBOLS = (
    r"[\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7\u0e3f\u2016\u2017\u2020-\u2023"
    r"\u2030-\u2038\u203b\u203e\u2041\u2042\u2044\u207a-\u207e\u208a-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109"
    r"\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f"
    r"\u2155-\u215e\u2190-\u2426\u2440-\u244a\u2460-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)


def _words(names: str) -> str:
    return "|".join(names.split())


def _as_is(token: str) -> list[str]:
    return [token]


def _spelled(token: str) -> list[str]:
    """One word in the Treebank's ASCII spelling."""
    return [_SPELLED.sub(lambda found: _SPELLING[found.group()], token)]


def _joined(token: str) -> list[str]:
    """One word although it holds spaces or parentheses: mixed fractions, telephone numbers, tags, smileys."""
    return ["".join(_PARENTHESES.get(mark, mark) for mark in token).replace(" ", "\u00a0")]


def _split(token: str) -> list[str]:
    at = _SPLIT_WORDS[token.lower()]
    return [token[:at], token[at:]]


def _dropped(token: str) -> list[str]:
    return []


_NAMES = f"{_words(_NAME_ABBREVIATION)}|(?-i:{_words(_CAPITAL_ABBREVIATION)}|{_words(_CAPITAL_ABBREVIATION.upper())})"

# Each rule: a pattern whose group 1 is the token; the rest of the match is context that must follow. The longest match
# wins, context included; the first of equals.
_Rule = tuple[str, Callable[[str], list[str]]]
_RULES: tuple[_Rule, ...] = (
    (rf"({_words(' '.join(_SPLIT_WORDS))})", _split),
    (rf"({_APOSTROPHE}t)(?:is|was)", _as_is),
    (r"(</?[A-Za-z][A-Za-z0-9:._-]*(?: +[^<>\r\n]*)?/?>|<[!?][A-Za-z-][^>\r\n]*>)", _joined),
    (rf"({_DOTTED_WORD}){_CLITIC}", _as_is),
    (rf"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}", _as_is),
    (rf"({_CLITIC}|{_NOT}){_NO_LETTER}", _spelled),
    (r"([\u2019\u0092](?:[msd]|re|ve|ll))", _spelled),
    (rf"({_NUMBER})", _as_is),
    (rf"((?:\d{{1,4}}(?:-|{_SPACE}))?\d{{1,4}}(?:\\?/|\u2044)\d{{1,4}})", _joined),
    (
        rf"((?:\(\d{{2,3}}\){_SPACE}?|(?:\+\+?)?(?:\d{{2,4}}(?:-|{_SPACE}))?\d{{2,4}}(?:-|{_SPACE}))"
        rf"\d{{3,4}}(?:-|{_SPACE})?\d{{3,5}})",
        _joined,
    ),
    (rf"({_DOTTED_WORD})", _as_is),
    (rf"({_HYPHENATED})", _as_is),
    (rf"((?:{_NAMES})\.)..", _as_is),
    (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", _as_is),
    (rf"({_HYPHENATED_DOTTED}|{_NAME})", _as_is),
    (rf"({_INITIALS})", _spelled),
    (rf"({_LETTER}+[aeiouy]{_WORD_APOSTROPHE}(?-i:[aeiouA-Z]){_LETTER}*)", _as_is),
    (rf"({_APOSTROPHE}n{_APOSTROPHE})|({_APOSTROPHE}n)(?:\s|$)", _as_is),
    (
        rf"([ldj]{_APOSTROPHE}|dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE}|{_APOSTROPHE}(?:em|till?|cause)"
        rf"|c{_APOSTROPHE}mon|cap{_APOSTROPHE}n|c{_APOSTROPHE}est|e{_APOSTROPHE}er|{_APOSTROPHE}[2-9]0s)",
        _as_is,
    ),
    (rf"({_APOSTROPHE}\d\d)(?:\s|$)", _as_is),
    (rf"(y{_APOSTROPHE})[a-z]", _as_is),
    (rf"((?:{_NAMES}|{_words(_TITLE_ABBREVIATION)})\.)", _as_is),
    (rf"((?:{_DOTTED_WORD}|{_HYPHENATED}|{_HYPHENATED_DOTTED}|{_INITIALS}|{_NAME})\.)[,;:\u3001]", _as_is),
    (rf"((?:{_words(_NUMBER_ABBREVIATION)})\.) ?\d", _as_is),
    (r"([a-z](?:\.[a-z])*\.)", _as_is),
    (
        r"""(https?://[^\s"<>|()]+[^\s"<>|.!?(){},-]|(?:www\.(?:[^\s"<>|.!?(){},]+\.)+[a-z]{2,4}"""
        r"""|(?:(?-i:[^\s!-$'(-)<,-_`{-}])+\.)+(?:com|net|org|edu))(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?)""",
        _as_is,
    ),
    (r"""(<?[a-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+>?)""", _as_is),
    (rf"(@[a-z_][a-z_0-9]*|\#{_LETTER}+)", _as_is),
    (r"([<>]?[:;=](?-i:[-o*'])?(?-i:[()DPdpO\\{@|\[\]]))(?![A-Za-z0-9])", _joined),
    (r"([-^x=~<>']_[-^x=~<>']|[\^x=~<>]\.[\^x=~<>])", _as_is),
    (r"((?-i:[A-Z]*)\$|s&(?:amp;)?p-500|s&(?:amp;)?ls|-[lr][rcs]b-|pro-|anti-|c(?:\+\+|\#)|&\#\d+;)", _as_is),
    (r"([?!]+|\#+|@+|_+|\*+|(?:\\\*){1,3}|<<|>>|[%+=/~^|\\<>]|&(?!nbsp;)(?:amp;|lt;|gt;)?)", _spelled),
    (rf"([{re.escape(''.join(key for key in _SPELLING if len(key) == 1))}])", _spelled),
    (rf"({_KEPT_SYMBOLS}|-{{5,}})", _as_is),
    (r"(-{2,4}|\.{3,5}|(?:\.[ \u00a0]){2,4}\.|''|``)", _dropped),
    (r"([`\u2018-\u201f\u0082\u0084\u0091-\u0094\u2039\u203a\u00ab\u00bb]{2})", _spelled),
    (r"(&nbsp;|&quot;|&apos;|.)", _dropped),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), action) for pattern, action in _RULES)
_SIMPLE = re.compile(r"[A-Za-z]+(?=[ \n]|$)")


def caption_words(caption: str) -> list[str]:
    """Lower-cased words without punctuation: "A man's hat." -> ["a", "man", "'s", "hat"].

    Brackets stay as "-lrb-" and the like, as they do in the published scores.
    """
    return [word for token in _tokens(caption) if (word := token.lower().replace("\u00ad", "")) not in _PUNCTUATION]


def _tokens(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        simple = _SIMPLE.match(text, position)
        if simple and simple.group().lower() not in _SPLIT_WORDS:
            yield simple.group()
            position = simple.end()
            continue
        token, action = _longest(text, position)
        yield from action(token)
        position += len(token)


def _longest(text: str, position: int) -> tuple[str, Callable[[str], list[str]]]:
    best: tuple[str, Callable[[str], list[str]]] = ("", _dropped)
    reach = position
    for pattern, action in _COMPILED:
        found = pattern.match(text, position)
        if found and found.end() > reach:
            reach = found.end()
            best = (str(found.group(found.lastindex or 1)), action)
    return best
