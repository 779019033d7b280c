"""The table of GEMMs: what it keeps, when it is asked, and that both ways through a block are one mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from engine import gemm_table
from engine.gemm_table import Times, faster, read_times, servable, with_table, write_times
from engine.models.decoder import ROW_BUCKETS, Decoder, row_bucket
from engine.models.loading import load_decoder
from engine.models.residual import FewRows, ManyRows
from engine.parallel import SingleRank


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = save_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama")
    # Not float32: on a CPU its weights are repacked.
    return load_decoder(path, dtype=torch.float64, device=torch.device("cpu"), group=SingleRank(), max_positions=64)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_and_many_rows_are_one_mathematics(decoder: Decoder, rows: int) -> None:
    x = torch.randn(rows, decoder.spec.hidden_size, dtype=torch.float64)
    outs = []
    for way in (ManyRows, FewRows):
        stream = way(x.clone(), decoder.spec.norm_eps)
        width = decoder.spec.num_heads * decoder.spec.head_dim
        for layer in decoder.layers:
            out = stream.read(layer.qkv, layer.input_norm_D)[:, :width]
            if layer is decoder.layers[-1]:
                out = stream.keep(torch.tensor([rows - 1]), out)
            stream.add(layer.output, out)
            stream.add(layer.down, stream.read(layer.gate_up, layer.mlp_norm_D, gated=True))
        outs.append(stream.normed(decoder.norm_D))
    assert outs[0].shape == (1, decoder.spec.hidden_size)
    torch.testing.assert_close(*outs)


def test_buckets() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 3, 16, 17, 33, 64, 65, 1024)] == [1, 2, 16, 16, 32, 64, 64, 0, 0]
    assert 0 not in ROW_BUCKETS


def test_ours_serves_where_it_is_clearly_faster() -> None:
    assert faster({1: Times(100.0, 90.0), 2: Times(100.0, 99.5), 16: Times(100.0, 120.0)}) == {1}


def test_a_decoder_on_a_cpu_is_left_alone(decoder: Decoder, tmp_path: Path) -> None:
    assert servable(decoder) == ROW_BUCKETS
    assert with_table(decoder, path=tmp_path / "table.json") is decoder
    assert not (tmp_path / "table.json").exists()
    assert decoder.few_rows == frozenset()


def test_the_table_keeps_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    assert read_times(path, "a GPU") == {}
    write_times(path, "a GPU", {1: Times(12.25, 10.0), 64: Times(20.0, 21.0)})
    write_times(path, "another", {1: Times(1.0, 2.0)})
    assert read_times(path, "a GPU") == {1: Times(12.25, 10.0), 64: Times(20.0, 21.0)}
    assert read_times(path, "another") == {1: Times(1.0, 2.0)}
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a GPU": 3}', '{"a GPU": {"1": {"cublas_us": "x"}}}', "\x00"])
def test_a_broken_table_is_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    assert read_times(path, "a GPU") == {}
    write_times(path, "a GPU", {2: Times(1.0, 2.0)})
    assert json.loads(path.read_text())["a GPU"] == {"2": {"cublas_us": 1.0, "ours_us": 2.0}}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    write_times(tmp_path / "file" / "table.json", "a GPU", {1: Times(1.0, 2.0)})
    assert read_times(tmp_path / "file" / "table.json", "a GPU") == {}


def test_the_table_lies_beside_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    assert gemm_table.table_path() == tmp_path / "gemm-table.json"
