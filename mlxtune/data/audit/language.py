"""In which language a text is, probably: by its script, and in Latin script by its small words. Knows no grammar."""

import re
from collections import Counter

# scripts that a language, or a few that a reader tells apart, are written in
SCRIPTS = {
    "Greek": "\u0370-\u03ff",
    "Cyrillic": "\u0400-\u052f",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Korean": "\u1100-\u11ff\uac00-\ud7af",
    "Japanese": "\u3040-\u30ff",
    "Chinese": "\u3400-\u9fff",
}
# small words that are frequent in one of these languages and rare in the others, or shared by few
STOP_WORDS = {
    "English": """a about all am an and any are as at be been but by can could did do does for from get had has have he
        her his how i if in is it its me my no not of on or our please she should so some that the their them there
        they this to was we were what when where which who why will with would you your""",
    "German": """aber als am auch auf aus bei bin bis bitte das dass dem den der des die durch ein eine einem einen
        einer er es für haben hat ich ihr im in ist kann können mein mit nach nicht noch oder sein sich sie sind über
        um und uns unter vom von vor war was wenn werden wie wir wird zu zum zur""",
    "French": """à au aux avec ce ces cette c'est dans de des du elle en est et être il ils je la le les leur mais
        mon ne nous on ou où par pas plus pour que qui sa se ses son sont sur un une votre vous""",
    "Spanish": """al como con de del desde donde el ella en eres es esta está este esto hay la las lo los más me mi
        muy no nos o para pero por puede que qué se ser si sin son su sus también tiene un una y ya yo""",
    "Italian": """al alla anche che chi ci come con da dal dei del della delle di e è gli ha hanno i il in la le lo
        ma mi nel nella non per più può quando questa questo se si sono su sua suo un una uno""",
    "Portuguese": """ao aos as com como da das de do dos e é ela ele em está eu foi isso já mais mas muito na não nas
        no nos o os ou para pela pelo por pode que se sem ser seu sua são também tem um uma você""",
    "Dutch": """aan als bij dat de den deze die dit door een en er het hij hoe ik in is je kan maar met mijn naar niet
        nog of om ook op te tot uit u van voor was wat we wel werd wij worden zal ze zijn""",
    "Swedish": """att av av den det dig din du där efter eller en ett från för ha han har hon hur här i inte jag kan
        kommer man med men mig min mitt måste ni nu när och om på sig ska som så till var vi vill är""",
}
STOP_WORDS_OF = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
MOST_CHARACTERS = 2000  # of a text that are looked at
FEWEST_SMALL = 3  # different small words from which a language is guessed
SHARE_SMALL = 0.1  # of a text's different words
CLEARLY = 1.5  # times as many small words as of the next language
LARGEST_SCRIPT = 0.3  # share of letters in another script that makes it the text's

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_OF_SCRIPT = {script: re.compile(f"[{ranges}]") for script, ranges in SCRIPTS.items()}


def language_of(text: str) -> str | None:
    """The language or script that a text is probably in; None where it is too short or mixed to say."""
    text = text[:MOST_CHARACTERS]
    return (None if text.isascii() else _script(text)) or _by_small_words(text)


def _script(text: str) -> str | None:
    letters = sum(character.isalpha() for character in text)
    counts = {script: len(pattern.findall(text)) for script, pattern in _OF_SCRIPT.items()}
    if counts["Japanese"] and counts["Japanese"] >= counts["Chinese"] / 10:
        counts["Japanese"] += counts.pop("Chinese")
    script, most = max(counts.items(), key=lambda each: each[1])
    return script if letters and most >= max(2, LARGEST_SCRIPT * letters) else None


def _by_small_words(text: str) -> str | None:
    words = set(_WORD.findall(text.casefold().replace("’", "'")))
    counts = Counter({name: len(words & small) for name, small in STOP_WORDS_OF.items()})
    (language, most), (_, next_most) = counts.most_common(2)
    if most < max(FEWEST_SMALL, SHARE_SMALL * len(words)) or most < CLEARLY * next_most:
        return None
    return language
