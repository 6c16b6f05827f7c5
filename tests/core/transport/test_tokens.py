from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from bench._tiny_models import byte_tokenizer, config_of, save_folder, tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.tensors.language_models import LanguageModel
from core.transport.tokens import check_vocabularies, encode, load_tokenizer
from tests.core.transport.checkpoints import needs_real, real

TEXT = "Once upon a time: é, 東京.\nThe end"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def with_specials() -> PreTrainedTokenizerBase:
    """A byte tokenizer that puts a token before and one behind; it trims spaces off offsets."""
    inner = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    around = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def words() -> PreTrainedTokenizerBase:
    """Whole words with the space before them, bytes elsewhere."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def plain(text: str, most: int = 512) -> list[tuple[int, int]]:
    found = encode(words(), text, system_prompt="", max_tokens=most)
    return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


def test_ends_count_characters_of_the_text() -> None:
    assert plain("a cat é") == [(0, 1), (1, 5), (5, 6), (6, 7), (6, 7)]


@pytest.mark.parametrize("make", [words, byte_tokenizer, with_specials])
def test_ids_are_those_of_the_whole_text(make: type) -> None:
    tokenizer = make()

    found = encode(tokenizer, TEXT, system_prompt="Be kind.", max_tokens=512)

    assert found.ids.tolist() == tokenizer("Be kind.\n\n" + TEXT)["input_ids"]
    assert found.ids.dtype == np.int64


@pytest.mark.parametrize("make", [words, byte_tokenizer, with_specials])
@pytest.mark.parametrize("system_prompt", ["", "Be kind. 東"])
def test_only_tokens_of_the_text_count(make: type, system_prompt: str) -> None:
    tokenizer = make()

    found = encode(tokenizer, TEXT, system_prompt=system_prompt, max_tokens=512)

    assert tokenizer.decode(found.ids[found.counts]) == TEXT
    assert found.ends[found.counts].min() >= 1
    assert found.ends[found.counts][-1] == len(TEXT)
    assert (np.diff(found.ends) >= 0).all()
    assert not (found.counts & found.special).any()


def test_special_tokens_stay_and_do_not_count() -> None:
    found = encode(with_specials(), "cat", system_prompt="", max_tokens=512)

    assert (found.ids[0], found.ids[-1]) == (256, 257)
    assert found.special.tolist() == [True, False, False, False, True]
    assert found.ends.tolist() == [0, 1, 2, 3, 3]


def test_cut_text_ends_behind_a_whole_character() -> None:
    assert plain("a東b", 2) == [(0, 1)]
    assert plain("a東b", 3) == [(0, 1)]
    assert plain("a東b", 4) == [(0, 1), (1, 2), (1, 2), (1, 2)]
    assert plain("a東", 4) == plain("a東")


def test_cut_before_the_closing_token_keeps_the_text() -> None:
    found = encode(with_specials(), "a東", system_prompt="", max_tokens=5)

    assert found.ends.tolist() == [0, 1, 2, 2, 2]


def test_system_prompt_that_leaves_no_room_is_told() -> None:
    with pytest.raises(DataInvalid, match="the system prompt before it has 12 tokens"):
        encode(words(), "a cat", system_prompt="0123456789", max_tokens=12)


def test_text_whose_only_token_reaches_into_the_system_prompt_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")

    assert encode(whole, "cat", system_prompt="", max_tokens=9).ends.tolist() == [3]
    with pytest.raises(DataInvalid, match="begins in the system prompt"):
        encode(whole, "cat", system_prompt="Be kind.", max_tokens=9)


@needs_real
@pytest.mark.parametrize("name", ["stories260k-hf", "babyllama105-hf"])
def test_real_tokenizers_read_the_text_to_its_end(name: str) -> None:
    tokenizer = load_tokenizer(real(name))

    found = encode(tokenizer, TEXT, system_prompt="Tell a story.", max_tokens=512)

    assert found.ends[-1] == len(TEXT)
    assert found.starts[found.counts][0] == 0
    reached = [TEXT[:end] for end in found.ends[found.counts].tolist()]
    assert reached[0] == "O"


@needs_real
def test_unknown_letters_melt_into_those_before_them() -> None:
    letters = load_tokenizer(real("babyllama105-hf"))

    with pytest.raises(DataInvalid, match="its only token begins in the system prompt"):
        encode(letters, "橋", system_prompt="Tell a story.", max_tokens=99)
    assert encode(letters, "橋a", system_prompt="Tell a story.", max_tokens=99).counts.sum() == 1
    assert encode(letters, "橋", system_prompt="", max_tokens=99).ends.tolist() == [1]


def test_saved_tokenizer_cuts_text_as_before(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)

    found = encode(load_tokenizer(tmp_path), TEXT, system_prompt="", max_tokens=512)

    known = encode(byte_tokenizer(), TEXT, system_prompt="", max_tokens=512)
    assert found.ids.tolist() == known.ids.tolist()


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_folder(tiny_model(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()

    with pytest.raises(DataInvalid, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')

    with pytest.raises(DataInvalid, match="transformers refuses it"):
        load_tokenizer(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    trap = tmp_path / "trap"
    (tmp_path / "custom.py").write_text(f"open({str(trap)!r}, 'w')\nclass Mine: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["custom.Mine", "custom.Mine"]}
    config["tokenizer_class"] = "Mine"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with contextlib.suppress(DataInvalid):
        load_tokenizer(tmp_path)
    assert not trap.exists()


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    save_folder(tiny_model(), tmp_path / "model")
    shape = ModelShape.of(config_of(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    return LanguageModel(shape, (), "a" * 64, 258, "a test")


def test_equal_tokenizers_share_their_ids(model: LanguageModel) -> None:
    found = check_vocabularies(model, model)

    assert (found.same, found.shared) == (True, 258)
    assert found.words == (
        "14 rows of the student's vocabulary are padding: no text has them",
        "14 rows of the teacher's vocabulary are padding: no text has them",
    )


def test_padded_vocabulary_of_one_model_is_told(model: LanguageModel) -> None:
    teacher = replace(model, shape=replace(model.shape, vocabulary=300))

    found = check_vocabularies(model, teacher)

    assert found.shared == 258
    assert "the embeddings have 272 and 300 rows" in found.words


def test_different_tokenizers_share_no_id(model: LanguageModel) -> None:
    found = check_vocabularies(model, replace(model, tokenizer="b" * 64))

    assert (found.same, found.shared) == (False, 0)
    assert "aligned by the characters" in found.words[0]


def test_vocabulary_smaller_than_the_tokenizer_is_refused(model: LanguageModel) -> None:
    with pytest.raises(DataInvalid, match="teacher: its tokenizer gives 273 ids"):
        check_vocabularies(model, replace(model, tokens=273))


def test_equal_tokenizers_of_different_sizes_are_refused(model: LanguageModel) -> None:
    with pytest.raises(DataInvalid, match="257 ids of the student beside 258"):
        check_vocabularies(replace(model, tokens=257), model)
