"""Some texts, cut by two tokenizers, and captures of tiny models over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench._tiny_models import byte_tokenizer
from core.specs.transport import Capture, Permute
from core.transport.capture import Keep, capture
from core.transport.moments import Captured
from core.transport.pairs import Pair, pair
from core.transport.streams import shape_of
from core.transport.tokens import encode

TEXTS = ("Ein Turm am See.", "The old mill, built in 1812, still turns.", "Zoë 🌉", "a b c d e f")
BYTES = byte_tokenizer()


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, some of them merged to longer tokens; <s> in front."""
    merges = [("t", "h"), ("th", "e"), ("u", "r"), ("i", "l"), ("il", "l"), ("Ġ", "a"), ("e", "r")]
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(two) for two in merges)]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary["<s>"] = len(letters)
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", add_bos_token=True)


MERGES = merging_tokenizer()


def paired(
    options: Capture | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    student: Any = BYTES,
    teacher: Any = BYTES,
) -> list[Pair]:
    """Cut and align the texts."""
    options = options or Capture()

    def cut(tokenizer: Any, text: str) -> Any:
        prompt, most = options.system_prompt, options.max_tokens
        return encode(tokenizer, text, system_prompt=prompt, max_tokens=most)

    return [pair(cut(student, text), cut(teacher, text), options) for text in texts]


def captured(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[Pair],
    options: Capture | None = None,
    *,
    permute: Permute | None = None,
    layer_map: Sequence[int] = (),
    keep: Keep | None = None,
) -> Captured:
    """Capture, layer beside layer where nothing else is said."""
    return capture(
        student,
        teacher,
        pairs,
        options=options or Capture(),
        layer_map=layer_map or range(shape_of(student).layers),
        permute=permute,
        report=lambda done, total: None,
        keep=keep,
    )


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """Have attention that keeps its maps."""
    model.set_attn_implementation("eager")
    return model
