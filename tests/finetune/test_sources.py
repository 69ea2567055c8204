"""Datasets by name, in all formats; what is cut, skipped, held out; the loss mask."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from xverse.cli import main
from xverse.config import UserError, build
from xverse.data.dialogues.formats import DatasetInfo
from xverse.finetune.dialogue import encode_within
from xverse.finetune.encode import load_data
from xverse.finetune.settings import DatasetUse, read_settings
from xverse.finetune.sources import KINDS, Source, find_sources, packaged, read_file, source_files
from xverse.tokenizer import encode_chat, encode_dialogue


def settings(folder: Path, **values: Any) -> Any:
    values = {"dataset": "alpaca_gpt4_en", "dataset_dir": str(folder), "do_train": True, **values}
    return read_settings({"model_name_or_path": "x", "output_dir": "y", **values}, "test")


def uses(names: str) -> list[DatasetUse]:
    return [DatasetUse(name=name.strip()) for name in names.split(",")]


def items(source: Source) -> list[Any]:
    return [item for file in source_files(source) for item in read_file(file, "sft", Counter())]


def test_names_are_entries_files_folders_and_homes(folder) -> None:
    found = find_sources(uses("alpaca_gpt4_en, turns.json,belle_1m,some/where"), folder)
    assert [source.path and source.path.name for source in found] == ["small.json", "turns.json", None, None]
    assert found[2].info.hf_hub_url == "BelleGroup/train_1M_CN"
    assert found[3].info.hf_hub_url == "some/where"
    (home,) = find_sources(uses("alpaca_gpt4_en"), folder.parent)  # no dataset_info.json of its own
    assert home.info.hf_hub_url == "llamafactory/alpaca_gpt4_en"
    (guessed,) = find_sources(uses("turns.json"), folder)
    assert len(items(guessed)) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_compressed_or_not_and_in_capitals(tmp_path, kind) -> None:
    row = {"instruction": "i", "output": "o"}
    plain = {
        ".json": json.dumps([row]).encode(),
        ".jsonl": json.dumps(row).encode(),
        ".txt": b"a line\n",
        ".csv": b"instruction,output\ni,o\n",
        ".tsv": b"instruction\toutput\ni\to\n",
    }
    names = {f"a{kind}": plain.get(kind), f"b{kind.upper()}": plain.get(kind)}
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        for name in names:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    else:
        names |= {f"c{kind}.gz": gzip.compress(plain[kind]), f"d{kind}.zst": zstandard.compress(plain[kind])}
        for name, data in names.items():
            (tmp_path / name).write_bytes(data)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / f"a{kind}").write_bytes(b"not read")
    (source,) = find_sources(uses(str(tmp_path)), tmp_path)
    assert [file.name for file in source_files(source)] == sorted(names)
    stage = "pt" if kind == ".txt" else "sft"
    for file in source_files(source):
        found = [item for item, _ in read_file(file, stage, Counter())]
        assert found == [{"text": "a line"} if kind == ".txt" else row], file.name
    (tmp_path / "a.xml").write_text("<a/>")
    (source,) = find_sources(uses(str(tmp_path / "a.xml")), tmp_path)
    with pytest.raises(UserError, match=r"a\.xml: unknown format; known are \.json, "):
        items(source)


def test_every_packaged_entry_is_well_formed() -> None:
    for name, values in packaged().items():
        assert build(DatasetInfo, values, name).hf_hub_url


def test_unknown_names_and_columns_list_what_exists(folder) -> None:
    with pytest.raises(UserError, match=r"did you mean 'alpaca_gpt4_en'.*other.*codealpaca"):
        find_sources(uses("alpaca_gtp4_en"), folder)
    (folder / "dataset_info.json").write_text(
        json.dumps({"a": {"file_name": "small.json", "columns": {"prompt": "question"}}, "b": {"colums": {}}})
    )
    with pytest.raises(UserError, match=r"no column 'question' \(columns: instruction, input, output\)"):
        items(find_sources(uses("a"), folder)[0])
    with pytest.raises(UserError, match="did you mean 'columns'"):
        find_sources(uses("b"), folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="invalid JSON"):
        find_sources(uses("a"), folder)
    with pytest.raises(UserError, match="cannot be fetched"):
        items(find_sources(uses("some/where"), folder.parent)[0])


def test_csv_parquet_and_text(tmp_path, tiny_tokenizer) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame({"instruction": ["q1", "q2"], "output": ["a1", "a2"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("a first line\n\na second one\n")
    both = load_data(settings(tmp_path, dataset="t.csv,t.parquet"), tiny_tokenizer, 64)
    assert [e.ids for e in both.train[:2]] == [e.ids for e in both.train[2:]]
    text = load_data(settings(tmp_path, dataset="t.txt", stage="pt"), tiny_tokenizer, 5)
    assert all(len(e.ids) <= 5 for e in text.train)
    ends = [e for e in text.train if e.ids[-1] == tiny_tokenizer.eos_id]
    assert len(ends) == 2
    assert ends[0].mask[0] is False
    assert all(ends[0].mask[1:])


def test_held_out_by_seed_and_said(folder, tiny_tokenizer, capsys) -> None:
    one = load_data(settings(folder, eval_strategy="steps"), tiny_tokenizer, 64)
    assert (len(one.train), len(one.valid)) == (39, 1)
    assert "1 of 40 examples held out (no validation set named)" in " ".join(capsys.readouterr().err.split())
    ten = load_data(settings(folder, val_size=10.0), tiny_tokenizer, 64)
    again = load_data(settings(folder, val_size=0.25), tiny_tokenizer, 64)
    assert ten.valid == again.valid
    other = load_data(settings(folder, val_size=10.0, seed=1), tiny_tokenizer, 64)
    assert other.valid != ten.valid
    names = [e.name for e in (*ten.train, *ten.valid)]
    assert len(set(names)) == 40
    named = load_data(settings(folder, eval_dataset="other", max_samples=7), tiny_tokenizer, 64)
    assert (len(named.train), len(named.valid)) == (7, 7)


MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "a second and longer question"},
    {"role": "assistant", "content": "second"},
]


def test_loss_begins_where_chat_would_and_ends_with_the_end_marker(tiny_tokenizer) -> None:
    ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, 500)
    assert (ids, mask) == encode_dialogue(tiny_tokenizer, MESSAGES)
    assert not cut
    prompt = encode_chat(tiny_tokenizer, MESSAGES[:-1], max_new_tokens=64).ids
    assert ids[: len(prompt)] == prompt
    assert tiny_tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "first answersecond"
    assert all(mask[len(prompt) :])
    assert ids[-1] == tiny_tokenizer.eos_id


def test_too_long_gives_way_on_the_prompts_side(tiny_tokenizer) -> None:
    whole = len(encode_dialogue(tiny_tokenizer, MESSAGES)[0])
    shorter = encode_dialogue(tiny_tokenizer, [MESSAGES[0], *MESSAGES[3:]])
    ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, whole - 1)
    assert ((ids, mask), cut) == (shorter, "lost their oldest rounds")
    answer = [*tiny_tokenizer.encode("second"), tiny_tokenizer.eos_id]
    for length in range(len(shorter[0]) - 1, 24, -1):
        ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, length)
        assert len(ids) <= length
        assert [i for i, m in zip(ids, mask, strict=True) if m] == answer
        assert "question cut" in cut
    long = [MESSAGES[1], {"role": "assistant", "content": "many words " * 50}]
    ids, mask, cut = encode_within(tiny_tokenizer, long, 30)
    assert (len(ids), cut) == (30, "had question and answer cut")
    assert ids[-1] != tiny_tokenizer.eos_id, "a cut answer has not ended"


def test_masks_on_request(folder, tiny_tokenizer) -> None:
    rows = [{"conversations": [{"from": r, "value": v} for r, v in
             (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]}]  # fmt: skip
    (folder / "many.json").write_text(json.dumps(rows))
    (all_turns,) = load_data(settings(folder, dataset="many.json"), tiny_tokenizer, 64).train
    (last,) = load_data(settings(folder, dataset="many.json", mask_history=True), tiny_tokenizer, 64).train
    (whole,) = load_data(
        settings(folder, dataset="many.json", train_on_prompt=True), tiny_tokenizer, 64
    ).train
    assert all_turns.ids == last.ids == whole.ids
    assert tiny_tokenizer.decode([i for i, m in zip(last.ids, last.mask, strict=True) if m]) == "d"
    assert sum(whole.mask) == len(whole.ids) - 1
    assert sum(last.mask) < sum(all_turns.mask)


def test_data_show_prints_one_example(folder, base, capsys) -> None:
    words = [
        "data",
        "show",
        "--dataset",
        "alpaca_gpt4_en",
        "--dataset-dir",
        str(folder),
        "--model",
        str(base),
    ]
    assert main([*words, "--index", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Human: say hello 3\n\nAssistant: good morning and again" in shown
    assert "with loss (bold green)" in shown
    assert main([*words, "--index", "40"]) == 2


def test_real_datasets_are_read(test_data, tiny_tokenizer) -> None:
    folder = test_data / "sft" / "llama-factory"
    if not folder.is_dir():
        pytest.skip("no LLaMA-Factory demos here")
    names = "alpaca_en_demo,alpaca_zh_demo,glaive_toolcall_en_demo,glaive_toolcall_zh_demo"
    data = load_data(settings(folder, dataset=names, max_samples=50), tiny_tokenizer, 4096)
    assert len(data.train) == 200
    text = load_data(
        settings(folder, dataset="wiki_demo,c4_demo", stage="pt", max_samples=5), tiny_tokenizer, 512
    )
    assert text.train


def test_a_checksum_is_checked(folder, tiny_tokenizer) -> None:
    file = folder / "small.json"
    entry = {"file_name": "small.json", "file_sha1": hashlib.sha1(file.read_bytes()).hexdigest()}
    (folder / "dataset_info.json").write_text(json.dumps({"a": entry}))
    assert len(load_data(settings(folder, dataset="a"), tiny_tokenizer, 64).train) == 40
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=r"small.json has SHA-1 .*, not .*; restore the file or update"):
        find_sources(uses("a"), folder)


def test_placeholders_need_an_identity(folder, tiny_tokenizer) -> None:
    rows = [{"instruction": "who", "input": "", "output": "I am {{name}} by {{author}}."}] * 3
    (folder / "who.json").write_text(json.dumps(rows))
    message = r"who.json: item 0 has unfilled placeholders .*; fill them with --identity author=… name=…, or"
    with pytest.raises(UserError, match=message):
        load_data(settings(folder, dataset="who.json"), tiny_tokenizer, 64)
    with pytest.raises(UserError, match="unfilled"):  # of a file in a folder, too
        load_data(settings(folder, dataset=str(folder)), tiny_tokenizer, 64)
    with pytest.raises(UserError, match="--identity author=…,"):
        load_data(settings(folder, dataset="who.json", identity={"name": "N"}), tiny_tokenizer, 64)
    named = settings(folder, dataset="who.json", identity={"name": "N", "author": "A"})
    example = load_data(named, tiny_tokenizer, 64).train[0]
    assert "I am N by A." in tiny_tokenizer.decode(example.ids)
    kept = load_data(settings(folder, dataset="who.json", keep_placeholders=True), tiny_tokenizer, 64)
    assert "{{name}}" in tiny_tokenizer.decode(kept.train[0].ids)


def test_files_of_a_folder_are_bounded_filtered_and_repeated(tmp_path, tiny_tokenizer, capsys) -> None:
    good = [{"instruction": f"say {i}", "input": "", "output": "one"} for i in range(40)]
    long = [{"instruction": "speak", "input": "", "output": "many words " * 30}]
    (tmp_path / "a.json").write_text(json.dumps(long + good))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "no instruction"}]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(good[0]).encode()))
    (tmp_path / "LICENSE").write_text("MIT")
    use = {"name": str(tmp_path), "num_samples": 41, "max_reply_tokens": 20, "repeat": 3}
    data = load_data(settings(tmp_path, dataset=[use], val_size=4.0), tiny_tokenizer, 400)
    counts = Counter(example.name for example in data.train)
    assert (len(counts), set(counts.values()), len(data.valid)) == (37, {3}, 4)
    assert not set(counts) & {example.name for example in data.valid}
    assert {example.dataset for example in (*data.train, *data.valid)} == {"a.json", "c.jsonl.gz"}
    log = " ".join(capsys.readouterr().err.split())
    assert "a.json: 40 examples; skipped 1: 1 with replies of more than 20 tokens" in log
    assert "b.json" in log
    assert "no column 'output'" in log
    few = settings(tmp_path, dataset=[{**use, "num_samples": 20}])
    names = [example.name for example in load_data(few, tiny_tokenizer, 400).train]
    assert len(set(names)) == 21
    assert names == [example.name for example in load_data(few, tiny_tokenizer, 400).train]
    other = settings(tmp_path, dataset=[{**use, "num_samples": 20}], seed=1)
    assert names != [example.name for example in load_data(other, tiny_tokenizer, 400).train]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"id": "x"}]', r"unknown format \(keys: id\); accepted are alpaca"),
        ("a.json", b"[]", "0 examples; nothing to train on"),
        ("a.json", b"[{]", "invalid JSON"),
        ("a.json", b'["\xff"]', "invalid UTF-8"),
        ("a.json", b'[{"instruction": "x", "output": ""}]', "skipped 1: 1 empty text; nothing to train on"),
        ("a.json.gz", gzip.compress(b"[" + b"{}, " * 5000, mtime=0)[:-20], "broken gzip stream"),
    ],
)
def test_unusable_files_are_refused(tmp_path, tiny_tokenizer, name, data, message) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_data(settings(tmp_path, dataset=name), tiny_tokenizer, 64)


def test_bad_lines_are_counted(tmp_path, tiny_tokenizer, capsys) -> None:
    good = json.dumps({"instruction": "Hi", "output": "Hello!"}).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "x"}\n{"instr\n\n' + good)
    (tmp_path / "b.jsonl").write_bytes(good + b'\n{"instr\n{"instruction": "\xff"}\n')
    with pytest.raises(UserError, match="no column 'output'"):
        load_data(settings(tmp_path, dataset="a.jsonl"), tiny_tokenizer, 64)
    assert (
        len(load_data(settings(tmp_path, dataset="b.jsonl", max_bad_share=1.0), tiny_tokenizer, 64).train)
        == 1
    )
    assert "skipped 2: 2 ill-formed lines" in " ".join(capsys.readouterr().err.split())


def test_every_public_demo_file_gives_its_dialogues(test_data, tiny_tokenizer) -> None:
    folder = test_data / "sft" / "llama-factory"
    counts = {"glaive_toolcall_en_demo": 300, "glaive_toolcall_zh_demo": 300, "kto_en_demo": 300}
    counts |= {"identity": 91}
    for name, count in counts.items():
        chosen = settings(folder, dataset=name, identity={"name": "N", "author": "A"})
        assert len(load_data(chosen, tiny_tokenizer, 4096).train) == count
    with pytest.raises(UserError, match=r"identity.json: item 0 has unfilled placeholders \{\{author"):
        load_data(settings(folder, dataset="identity"), tiny_tokenizer, 4096)
