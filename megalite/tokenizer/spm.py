"""SentencePiece models. Their own library encodes; a conversion to tokenizer.json is checked before use."""

import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer

_SPACE = "\u2581"
_PROBES = (
    "", "a", " ", "  ", " leading and trailing ", "two  spaces,\ttabs\tand\nlines\r\n\n  indented\n",
    "def f(x: int) -> float:\n    return 3.14159 * x ** 2  # comment\n", "1234567890 0x7f -1e-5",
    "The quick brown fox jumps over the lazy dog. It's the dogs' day; they'll say \u201cno\u201d.",
    "\u00e9t\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600 e\u0301",
    "\ufb01 \u00a0 \u3000 \x00",
    f"{_SPACE}x y{_SPACE}", "aaaaaaaaaaaaaaaa", "                 x", "----------====", "((((()))))",
)  # fmt: skip


class SentencePieceTokenizer(Tokenizer):
    """The content of a .model file; the end of text is its eos piece unless `eos_token` names another."""

    def __init__(self, model: bytes, name: str, eos_token: str | None = None) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{name}: not a SentencePiece model: name another file") from error
        if eos_token is None and self._processor.eos_id() >= 0:
            eos_token = self._processor.IdToPiece(self._processor.eos_id())
        super().__init__(name, eos_token)

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._processor.EncodeAsIds(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds(list(ids))

    def token_to_id(self, token: str) -> int | None:
        found = self._processor.PieceToId(token)
        return found if self._processor.IdToPiece(found) == token else None

    def to_backend(self) -> Backend:
        return self._converted

    def _content(self) -> bytes:
        return self._processor.serialized_model_proto()

    def sentencepiece_model(self) -> bytes:
        return self._content()

    def special_tokens(self) -> dict[str, Any]:
        """Its own, and whether a space is put before a text: llama.cpp looks here for it."""
        ids = {"bos_token": self._processor.bos_id(), "unk_token": self._processor.unk_id()}
        named = {name: self._processor.IdToPiece(token) for name, token in ids.items() if token >= 0}
        return named | {"add_prefix_space": _read_model(self._content()).normalizer_spec.add_dummy_prefix}

    @cached_property
    def _converted(self) -> Backend:
        """The tokenizer.json twin; TokenizerError when its ids differ from SentencePiece's on any probe text.

        The probes are awkward texts, and all pieces of the vocabulary joined in rows.
        """
        backend = _convert(self._processor, self.name)
        pieces = [self._processor.IdToPiece(index) for index in range(self.vocab_size)]
        ordinary = [piece.replace(_SPACE, " ") for piece in pieces if not piece.startswith("<")]
        rows = ["".join(ordinary[start : start + 16]) for start in range(0, len(ordinary), 16)]
        for text in (*_PROBES, *rows):
            if backend.encode(text, add_special_tokens=False).ids != self._processor.EncodeAsIds(text):
                reason = f"tokenizer.json cannot express this SentencePiece model: ids differ for {text!r}"
                raise TokenizerError(f"{self.name}: {reason}: use the .model file itself")
        return backend


def convert_unigram(content: bytes, name: str) -> Tokenizer:
    """A unigram .model as a tokenizer.json, which may cut one text in a hundred in another, equally good way.

    Both add scores of pieces, in another precision: among equal sums they may choose differently. So such a
    tokenizer is used in this form only. Raises TokenizerError for another kind, or one that changes text.
    """
    model = _read_model(content)
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or _changes_text(model):
        reason = "only unigram models that keep text as it is can be converted"
        raise TokenizerError(f"{name}: {reason}: use the .model file itself")
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    fallback, unknown = model.trainer_spec.byte_fallback, model.trainer_spec.unk_id
    backend = _dress(Backend(models.Unigram(scores, unk_id=unknown, byte_fallback=fallback)), model)
    names = {"bos_token": model.trainer_spec.bos_piece, "unk_token": model.trainer_spec.unk_piece}
    return HuggingFaceTokenizer(backend, name, model.trainer_spec.eos_piece, names)


def check_same_pieces(content: bytes, backend: Backend, name: str) -> None:
    """TokenizerError unless every piece of a .model has the id in a tokenizer.json that it has there."""
    for index, piece in enumerate(_read_model(content).pieces):
        if backend.id_to_token(index) != piece.piece:
            found = f"expected {piece.piece!r} as id {index}, found {backend.id_to_token(index)!r}"
            raise TokenizerError(f"{name}: {found}: remove tokenizer.model, which is of another tokenizer")


def _read_model(content: bytes) -> Any:
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # made at run time, untyped
    return proto.ModelProto.FromString(content)


def _changes_text(model: Any) -> bool:
    """Whether it normalises: `tokenizers` maps graphemes there, SentencePiece characters."""
    spec = model.normalizer_spec
    return bool(spec.precompiled_charsmap or spec.remove_extra_whitespaces)


def _convert(processor: sentencepiece.SentencePieceProcessor, name: str) -> Backend:
    """The same vocabulary and merges in `tokenizers`; models without an exact form are refused."""
    model = _read_model(processor.serialized_model_proto())
    if model.trainer_spec.model_type != model.trainer_spec.BPE or _changes_text(model):
        reason = "only BPE models that keep text as it is have an exact tokenizer.json form"
        raise TokenizerError(f"{name}: {reason}: use the .model file itself")
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    fallback, unknown = model.trainer_spec.byte_fallback, model.pieces[processor.unk_id()].piece
    bpe = models.BPE(vocabulary, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    return _dress(Backend(bpe), model)


def _dress(backend: Backend, model: Any) -> Backend:
    """Spaces made visible and back, and the control pieces as special tokens."""
    backend.normalizer = _normalizer(model.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    replace = decoders.Replace(_SPACE, " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), *strip])
    kinds = (model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN)
    control = [piece.piece for piece in model.pieces if piece.type in kinds]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return backend


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: what SentencePiece's BPE tries."""
    normal = model.SentencePiece.NORMAL
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == normal}
    merges = [
        (-score, cut, (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:1])]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """A leading space where the model asks for one, and spaces made visible."""
    steps: list[normalizers.Normalizer] = []
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
