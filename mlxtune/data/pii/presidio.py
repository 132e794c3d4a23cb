"""Names, places and more, by the optional presidio-analyzer: `find` is `pii.find` and what that library adds to it.

Needs `pip install 'mlxtune[pii]'` and an installed English spaCy model; downloads nothing by itself. What it finds are
guesses of a model, with a score, where the core's findings are forms and check digits: read them before you trust them.
"""

import functools
from typing import Any

from mlxtune.data import pii
from mlxtune.errors import InputError

# presidio's name: ours. What the core finds itself is not asked for: its e-mail recogniser may also use the network.
ENTITIES = {
    "PERSON": "person",
    "LOCATION": "place",
    "NRP": "group",  # nationality, religious or political group
    "US_DRIVER_LICENSE": "national_id",
    "US_PASSPORT": "national_id",
    "MEDICAL_LICENSE": "national_id",
    "CRYPTO": "wallet",
}
NAMES = {
    "person": "names of persons",
    "place": "places",
    "group": "nationalities, religious or political groups",
    "wallet": "crypto wallets",
}
MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm", "en_core_web_trf")  # the first installed one is used
_LEAST_SCORE = 0.5


def find(text: str) -> list[pii.Finding]:
    """The core's findings and presidio's beside them, in order of place. Raises InputError if a library is missing."""
    found = _analyzer().analyze(text, language="en", entities=list(ENTITIES), score_threshold=_LEAST_SCORE)
    found.sort(key=lambda each: (-each.score, each.start))
    added = [pii.Finding(ENTITIES[each.entity_type], each.start, each.end) for each in found]
    return pii.without_overlap([*pii.find(text), *added])


@functools.cache
def _analyzer() -> Any:
    """presidio's engine over the best English spaCy model that is installed."""
    try:
        import presidio_analyzer  # noqa: F401
        import spacy
    except ImportError:
        raise InputError(
            "names need presidio-analyzer, which is not installed", hint="pip install 'mlxtune[pii]'"
        ) from None
    model = next((name for name in MODELS if spacy.util.is_package(name)), None)
    if model is None:
        hint = "python -m spacy download en_core_web_sm"
        raise InputError("names need an English spaCy model, and none is installed", hint=hint)
    return engine(spacy.load(model))


def engine(pipeline: Any) -> Any:
    """An AnalyzerEngine over an English spaCy pipeline; over a blank one only its pattern recognisers find anything."""
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    nlp = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "given"}])
    nlp.nlp = {"en": pipeline}
    return AnalyzerEngine(nlp_engine=nlp, supported_languages=["en"])
