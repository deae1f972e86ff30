"""From text to shards."""

import numpy as np
import pytest

import fineweb
from fineweb import END_OF_TEXT, UserError, encode_document, tokenizer, whole_file, write_shards


def test_the_tokenizer_is_gpt2s():
    # Ids as in OpenAI's encoder.json.
    assert tokenizer().encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer().n_vocab == 50257
    assert tokenizer().eot_token == END_OF_TEXT == 50256
    text = "naïve \U0001f600 世界\r\n\t  don't 12345 <|endoftext|>"
    assert tokenizer().decode(tokenizer().encode_ordinary(text)) == text


def test_a_document_opens_with_end_of_text_and_holds_no_other():
    tokens = encode_document("a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert tokens[0] == END_OF_TEXT
    assert END_OF_TEXT not in tokens[1:]
    assert encode_document("").tolist() == [END_OF_TEXT]


def test_altered_ranks_are_refused(tmp_path, monkeypatch):
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(fineweb.RANKS_FILE.read_bytes()[:-1] + b"7")
    monkeypatch.setattr(fineweb, "RANKS_FILE", altered)
    tokenizer.cache_clear()
    with pytest.raises(UserError, match="SHA-256"):
        tokenizer()
    monkeypatch.setattr(fineweb, "RANKS_FILE", tmp_path / "missing")
    with pytest.raises(UserError, match="missing"):
        tokenizer()


def test_shards_hold_the_documents_one_after_the_other(tmp_path):
    documents = ["one two three", "", "four " * 100, "five"]
    paths = write_shards(documents, tmp_path / "data", "text", 30)
    stream = np.concatenate([encode_document(d) for d in documents])
    shards = [np.load(path) for path in paths]
    assert [path.name for path in paths[:2]] == ["text_val_000000.npy", "text_train_000001.npy"]
    assert all(s.dtype == np.uint16 and s.ndim == 1 for s in shards)
    assert [len(s) for s in shards[:-1]] == [30] * (len(shards) - 1)
    assert np.array_equal(np.concatenate(shards), stream)
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_no_empty_shard_when_the_text_ends_with_one(tmp_path):
    assert len(write_shards(["a b", "c d"], tmp_path, "text", 3)) == 2


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"second")
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_demo_corpus_takes_no_folder_that_is_something_else(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds no shards"):
        fineweb.write_demo(tmp_path / "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_the_demo_corpus_is_prose_of_the_expected_size_and_always_the_same(tmp_path):
    for name in ("a", "b"):
        fineweb.write_demo(tmp_path / name)
    paths, again = (sorted((tmp_path / name).iterdir(), key=lambda p: p.name[-10:]) for name in ("a", "b"))
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    assert 200_000 < sum(len(np.load(p)) for p in paths) < 600_000
    assert "_val_" in paths[0].name
    assert len(paths) > 2
    text = tokenizer().decode(np.load(paths[1]).tolist())
    assert text.count(" the ") > 500
