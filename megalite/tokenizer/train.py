"""Tokenizers trained on texts, each of a kind that megalite and transformers load."""

import io
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.tokenizer import END_OF_TEXT, MODEL_FILE, HuggingFaceTokenizer, Tokenizer

MIN_VOCAB = {"byte-bpe": 257, "lillm": 272, "sentencepiece-bpe": 300, "sentencepiece-unigram": 300}
LILLM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<r{index}>" for index in range(13))]


def train_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int, folder: Path, model_max_length: int | None = None
) -> Tokenizer:
    """Train a tokenizer of `kind` (a key of MIN_VOCAB) with `vocab_size` ids and write it to `folder`.

    model_max_length: context of the model in tokens, for tokenizer_config.json. Raises TokenizerError when
    the kind cannot have so few ids, or the texts do not hold so many.
    """
    if vocab_size < MIN_VOCAB[kind]:
        expected = f"expected at least {MIN_VOCAB[kind]} for {kind}"
        raise TokenizerError(f"--vocab-size: {expected}, found {vocab_size}: raise it")
    folder.mkdir(parents=True, exist_ok=True)  # training takes long: what cannot be written fails before
    tokenizer = _train(kind, texts, vocab_size)
    if model_max_length is None:
        tokenizer.save(folder)
    else:
        tokenizer.save(folder, model_max_length)
    return tokenizer


def _train(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    if kind == "byte-bpe":
        return HuggingFaceTokenizer(train_byte_bpe(texts, vocab_size, [END_OF_TEXT]), kind, END_OF_TEXT)
    if kind == "lillm":
        names = {"bos_token": "<s>", "unk_token": "<unk>"}
        backend = train_byte_bpe(texts, vocab_size, LILLM_TOKENS)
        return HuggingFaceTokenizer(backend, kind, "</s>", names)
    from megalite.tokenizer.spm import SentencePieceTokenizer, convert_unigram  # only where it is needed

    model = train_sentencepiece(texts, vocab_size, kind.removeprefix("sentencepiece-"))
    if kind == "sentencepiece-bpe":
        return SentencePieceTokenizer(model, MODEL_FILE)
    return convert_unigram(model, MODEL_FILE)


def train_byte_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Backend:
    """Byte-level BPE with GPT-2's word pattern; the special tokens are the first ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_sentencepiece(texts: Iterable[str], vocab_size: int, kind: str) -> bytes:
    """A SentencePiece model, "bpe" or "unigram", that keeps text as it is: all spaces, bytes for the rare."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(
                line for text in texts for line in text.splitlines(keepends=True) if line.strip()
            ),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = f"sentencepiece could not train {vocab_size} ids: {str(error).splitlines()[0]}"
        raise TokenizerError(f"{reason}: try a smaller --vocab-size") from error
    return model.getvalue()
