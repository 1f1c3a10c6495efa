"""Is a translation in the right language, and how good is it? Floor 3, no torch; needs the extra `mt`.

Languages are told apart by py3langid, whose model comes with the package. On the first words of 250 Multi30k sentences a language,
restricted to these four (en, de, fr, cs), it names the right one in 92 % of cases at two words, 99.5 % at three and 100 % from five on, in
0.02 ms; lingua (20 times the size) in 94, 97.5 and 99.1 %, langdetect in 70, 84 and 95 %. BLEU and chrF are sacrebleu's.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trocar.core.errors import MetricError, MissingExtraError, nearest
from trocar.core.seeds import derive
from trocar.evaluate.measurement import Measurement

UNDETERMINED = "undetermined"
MIN_LETTERS = 6  # below, two languages of four are confused in more than one case of ten
METRICS = ("bleu", "chrf")
RESAMPLES = 1000

# ISO 639-1: other codes and the English name. Codes outside the table pass as they are, if the identifier knows them
_NAMES = {
    "ar": "ara Arabic", "bg": "bul Bulgarian", "ca": "cat Catalan", "cs": "ces cze Czech", "da": "dan Danish", "de": "deu ger German",
    "el": "ell gre Greek", "en": "eng English", "es": "spa Spanish", "et": "est Estonian", "fa": "fas per Persian", "fi": "fin Finnish",
    "fr": "fra fre French", "he": "heb iw Hebrew", "hi": "hin Hindi", "hr": "hrv Croatian", "hu": "hun Hungarian", "id": "ind Indonesian",
    "it": "ita Italian", "ja": "jpn Japanese", "ko": "kor Korean", "lt": "lit Lithuanian", "lv": "lav Latvian", "nl": "nld dut Dutch",
    "no": "nor nb nob Norwegian", "pl": "pol Polish", "pt": "por Portuguese", "ro": "ron rum Romanian", "ru": "rus Russian",
    "sk": "slk slo Slovak", "sl": "slv Slovenian", "sr": "srp Serbian", "sv": "swe Swedish", "th": "tha Thai", "tr": "tur Turkish",
    "uk": "ukr Ukrainian", "vi": "vie Vietnamese", "zh": "zho chi Chinese",
}  # fmt: skip
_CODES = {alias.lower(): code for code, names in _NAMES.items() for alias in (code, *names.split())}


def language_code(language: str) -> str:
    """The two-letter code of a language given as code or English name: `de`, `deu`, `ger`, `de_DE`, `de-AT`, `German` -> `de`.

    Raises MetricError for what is neither a known code nor a known name.
    """
    text = language.strip().lower().replace("_", "-")
    found = _CODES.get(text) or _CODES.get(text.partition("-")[0])
    if found is None and text.partition("-")[0] not in _labels():
        raise MetricError(f"'{language}' is no language that the identifier knows.", nearest(text, _CODES))
    return found or text.partition("-")[0]


def language_name(code: str) -> str:
    """The English name, for prompts: `de` -> `German`. Raises MetricError for a language without a row in the table."""
    known = language_code(code)
    if known not in _NAMES:
        raise MetricError(f"There is no English name for '{code}' in the table.", "Give the languages' names yourself.")
    return _NAMES[known].split()[-1]


def translation_prompt(source: str, target: str, text: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt that asks for `text` (codes of both languages), after example pairs: `English: <text>\\nGerman:` (arXiv:2410.07054).

    White space inside a sentence, line breaks too, becomes one blank.
    """
    names = (language_name(source), language_name(target))
    lines = [f"{name}: {' '.join(part.split())}\n" for pair in examples for name, part in zip(names, pair, strict=True)]
    return "".join(lines) + f"{names[0]}: {' '.join(text.split())}\n{names[1]}:"


def _langid() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise MissingExtraError("Telling languages apart needs the package `py3langid`.", "pip install 'trocar[mt]'") from None
    return langid


@functools.lru_cache(maxsize=1)
def _labels() -> frozenset[str]:
    langid = _langid()
    return frozenset(langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels)


@functools.lru_cache(maxsize=8)
def _identifier(languages: tuple[str, ...]) -> Any:
    langid = _langid()
    made = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    if missing := [code for code in languages if code not in made.labels]:
        raise MetricError(f"The language identifier does not know {', '.join(missing)}.", f"It knows {', '.join(sorted(made.labels))}.")
    made.set_languages(list(languages))
    return made


def letters(text: str) -> int:
    """How much there is to tell a language from: letters, with three for one of a script that writes syllables or words."""
    wide = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
    return sum(3 if unicodedata.name(character, "").startswith(wide) else 1 for character in text if character.isalpha())


def identify(texts: Sequence[str], languages: Sequence[str], min_letters: int = MIN_LETTERS) -> list[str]:
    """The language of every text among `languages` (codes or names), as a two-letter code; `undetermined` below `min_letters` letters.

    A text in a language that is not among them is called the nearest of them: name every language that the outputs may be in.
    Raises MissingExtraError without py3langid, MetricError for fewer than two languages or unknown ones.
    """
    codes = tuple(sorted({language_code(language) for language in languages}))
    if len(codes) < 2:
        raise MetricError(f"Languages to tell apart: {', '.join(codes) or 'none'}.", "Name at least two.")
    identifier = _identifier(codes)
    return [UNDETERMINED if letters(text) < min_letters else str(identifier.classify(text)[0]) for text in texts]


def mismatches(
    texts: Sequence[str], expected: str | Sequence[str], languages: Sequence[str], strict: bool = False, min_letters: int = MIN_LETTERS
) -> np.ndarray:
    """1.0 for every output in another language than expected, (n,). expected: one language, or one a text.

    An output without any letter is a mismatch. One with too few letters to tell counts as a mismatch only if strict.
    """
    wanted = [expected] * len(texts) if isinstance(expected, str) else list(expected)
    if len(wanted) != len(texts):
        raise MetricError(f"{len(texts)} outputs and {len(wanted)} expected languages cannot be paired.", "Give one for every output.")
    codes = [language_code(language) for language in wanted]
    found = identify(texts, [*languages, *codes], min_letters)
    flags = [
        not letters(text) or (strict if is_ == UNDETERMINED else is_ != code) for text, is_, code in zip(texts, found, codes, strict=True)
    ]
    return np.array(flags, dtype=np.float64)


def language_mismatch(
    before: Sequence[str],
    after: Sequence[str],
    expected: str | Sequence[str],
    states: tuple[str, str],
    languages: Sequence[str],
    strict: bool = False,
    name: str = "mismatch",
    groups: Any = None,
    min_letters: int = MIN_LETTERS,
) -> Measurement:
    """Share of outputs in the wrong language before and after a change; the arguments are those of `mismatches`. Every output counts."""
    sides = [mismatches(texts, expected, languages, strict, min_letters) for texts in (before, after)]
    scorer = f"language by py3langid among {', '.join(sorted({language_code(one) for one in languages}))}; too short to tell is " + (
        "a mismatch" if strict else "no mismatch"
    )
    return Measurement(name, "output", sides[0], sides[1], scorer, states[0], states[1], better="lower", groups=groups, form="share")


def _metric(metric: str, language: str, sentence: bool) -> Any:
    if metric not in METRICS:
        raise MetricError(f"'{metric}' is not a translation metric.", nearest(metric, METRICS))
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise MissingExtraError("BLEU and chrF need the package `sacrebleu`.", "pip install 'trocar[mt]'") from None
    if metric == "chrf":
        return CHRF()
    tokenizer = {"zh": "zh"}.get(language_code(language) if language else "", "13a")
    return BLEU(tokenize=tokenizer, effective_order=sentence, force=True)


def sentence_scores(outputs: Sequence[str], references: Sequence[str], metric: str, language: str = "") -> np.ndarray:
    """Sentence BLEU (smoothed, effective order) or chrF of every output, 0 to 100, (n,). language: of the outputs, for BLEU's tokeniser."""
    scorer = _metric(metric, language, sentence=True)
    pairs = zip(outputs, references, strict=True)
    return np.array([scorer.sentence_score(output, [reference]).score for output, reference in pairs], dtype=np.float64)


@dataclass(frozen=True)
class CorpusScore:
    """Corpus BLEU or chrF of two sets of outputs for the same references; low..high is the 95 % interval of after - before."""

    metric: str
    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float


def corpus_score(
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    metric: Literal["bleu", "chrf"],
    language: str = "",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> CorpusScore:
    """Corpus-level BLEU or chrF before and after, with a paired bootstrap (Koehn 2004): sentences are drawn with replacement, both sides
    together, and the corpus score of each draw is computed from the sentences' counts. Raises MetricError for unequal or no sentences."""
    if not len(before) == len(after) == len(references) or not before:
        raise MetricError(f"{len(before)} outputs before, {len(after)} after and {len(references)} references cannot be compared.")
    scorer = _metric(metric, language, sentence=False)
    # the counts behind a corpus score are what sacrebleu's own significance tests draw from
    counts = [np.array(scorer._extract_corpus_statistics(list(side), [list(references)])) for side in (before, after)]

    def score(rows: Any) -> float:
        return float(scorer._compute_score_from_stats(rows.sum(0).tolist()).score)

    whole = [score(side) for side in counts]
    generator = np.random.default_rng(derive(seed, "corpus", metric))
    draws = []
    for _ in range(resamples if len(before) > 1 else 0):
        rows = generator.integers(0, len(before), len(before))
        draws.append(score(counts[1][rows]) - score(counts[0][rows]))
    low, high = np.quantile(draws, (0.025, 0.975)).tolist() if draws else (float("nan"),) * 2
    return CorpusScore(metric, len(before), whole[0], whole[1], whole[1] - whole[0], low, high)


def parts(errors: np.ndarray | Sequence[float] | None, n: int) -> dict[str, np.ndarray]:
    """Rows by part: all, and where errors are given (before the change) `error_free` and `errors`; empty parts are left out."""
    rows = {"": np.arange(n)}
    if errors is not None:
        flags = np.asarray(errors, dtype=bool)
        if flags.shape != (n,):
            raise MetricError(f"{n} outputs and errors of shape {flags.shape} cannot be paired.", "Give one for every output.")
        rows |= {"error_free": np.flatnonzero(~flags), "errors": np.flatnonzero(flags)}
    return {name: index for name, index in rows.items() if len(index)}


def translation_quality(
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    states: tuple[str, str],
    errors: np.ndarray | Sequence[float] | None = None,
    language: str | Sequence[str] = "",
    metrics: Sequence[str] = METRICS,
    groups: Sequence[Any] | None = None,
) -> list[Measurement]:
    """Sentence BLEU and chrF before and after: `bleu`, `chrf`, and with errors given `bleu.error_free`, `bleu.errors` and so on.

    errors: (n,) which outputs were wrong *before* the change (wrong language or loop), so that gains and side effects are seen apart.
    The mean of sentence scores, which pairs unit by unit; for corpus scores see `corpus_score`.
    """
    languages = [language] * len(before) if isinstance(language, str) else list(language)
    if not len(before) == len(after) == len(references) == len(languages) or not before:
        raise MetricError(f"{len(before)} outputs before, {len(after)} after and {len(references)} references cannot be compared.")
    made = []
    for metric in metrics:
        sides = [_by_language(side, references, metric, languages) for side in (before, after)]
        for part, rows in parts(errors, len(before)).items():
            name = f"{metric}.{part}" if part else metric
            scorer = f"sacrebleu sentence {'BLEU, smoothed' if metric == 'bleu' else 'chrF'}, 0 to 100"
            labels = None if groups is None else [groups[row] for row in rows]
            values = (sides[0][rows], sides[1][rows])
            made.append(Measurement(name, "sentence", *values, scorer, *states, better="higher", groups=labels, form="number"))
    return made


def _by_language(outputs: Sequence[str], references: Sequence[str], metric: str, languages: Sequence[str]) -> np.ndarray:
    found = np.zeros(len(outputs))
    for language in dict.fromkeys(languages):
        rows = [row for row, name in enumerate(languages) if name == language]
        found[rows] = sentence_scores([outputs[row] for row in rows], [references[row] for row in rows], metric, language)
    return found


def marks(mismatch: np.ndarray, loop: np.ndarray) -> list[str]:
    """One word a row for a transcript: `wrong language`, `loop`, both, or nothing."""
    return [
        ", ".join(word for word, flag in (("wrong language", bad), ("loop", again)) if flag)
        for bad, again in zip(mismatch, loop, strict=True)
    ]
