"""The tokenizer of published weights with the real library: a corpus becomes its ids, and they the corpus."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from switchmoe.data import DataConfig, FileTokenizer, batches, load_packed
from switchmoe.data.corpora import find_domains, read_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE of 600 ids trained on a bundled domain, saved as published ones are."""
    place = tmp_path_factory.mktemp("published")
    texts = [text.decode() for text in read_documents(find_domains("bundled")["bible_spanish"])[:100]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", *(f"<extra_id_{number}>" for number in range(30))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(8)  # as some published files do
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return place


@pytest.mark.parametrize("objective", ["next_token", "span_corruption"])
def test_a_corpus_of_its_ids_is_the_corpus(folder, tmp_path, objective):
    documents = read_documents(find_domains("bundled")["bible_spanish"])[:40]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"\f".join(documents))
    config = DataConfig(
        str(tmp_path / "corpus"),
        sequence_length=64,
        cache_dir=str(tmp_path / "cache"),
        tokenizer=str(folder),
        objective=objective,
    )
    packed = load_packed(config)
    tokenizer = FileTokenizer(folder)
    assert tokenizer.eos == 0 and len(tokenizer.special.sentinels) == 30
    tokens = np.concatenate([rows.tokens.ravel() for rows in (packed.train, packed.validation)])
    tokens = tokens[tokens > 0].astype(int) - 1
    texts = [tokenizer.decode(part[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]]
    # One document is cut in two where the held-out part begins.
    assert "".join(texts) == b"".join(documents).decode()
    batch = batches(packed.train, 4, seed=0, corruption=config.corruption)[0]
    assert batch.mask_BS.all() and (batch.ids_BS[:, 1:] == 0).sum() < 40
    if objective == "span_corruption":
        assert (batch.source_BP == tokenizer.special.sentinels[0]).sum() == 4
