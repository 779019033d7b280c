"""The public surface is this list. To add a name, add it here and to the CHANGELOG; to remove one, deprecate it first."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import headrace

PUBLIC = {
    *("Batch", "BatchStatus", "ChatTemplateConfig", "Choice", "Client", "Completion", "CompletionError", "Conflict"),
    *(
        "ContextLengthExceeded",
        "EngineError",
        "GenerationConfig",
        "HeadersTooLarge",
        "HeadraceError",
        "InvalidRequest",
        "KVCapacity",
    ),
    *("ModelLoadError", "ModelNotFound", "NotFound", "NumericalError", "PayloadTooLarge", "PoisonPrompt"),
    *(
        "PytorchEngineConfig",
        "QueueFull",
        "QueueUnavailable",
        "QuotaExceeded",
        "RankLost",
        "RequestAborted",
        "RequestCounts",
        "Response",
    ),
    *(
        "ServiceUnavailable",
        "StorageFull",
        "StoreUnavailable",
        "TokenLogprobs",
        "TokenUsage",
        "TurbomindEngineConfig",
        "Unauthorized",
    ),
    *("UnsupportedOption", "pipeline"),
}
# What LMDeploy's document of January 2024 names, in its order; later fields come after these.
DOCUMENT = {
    "GenerationConfig": "n max_new_tokens top_p top_k temperature repetition_penalty ignore_eos random_seed stop_words bad_words",
    "PytorchEngineConfig": "model_name tp session_len max_batch_size eviction_type prefill_interval block_size num_cpu_blocks "
    "num_gpu_blocks adapters",
    "TurbomindEngineConfig": "model_name model_format tp session_len max_batch_size cache_max_entry_count quant_policy "
    "rope_scaling_factor use_logn_attn",
    "ChatTemplateConfig": "model_name system meta_instruction eosys user eoh assistant eoa capability stop_words",
}


def test_the_surface_is_frozen() -> None:
    assert set(headrace.__all__) == PUBLIC


def test_every_public_name_is_there_and_documented() -> None:
    for name in sorted(PUBLIC):
        thing = getattr(headrace, name)
        assert inspect.getdoc(thing), f"headrace.{name} has no docstring"


def test_the_documents_fields_keep_their_names_and_order() -> None:
    for name, fields in DOCUMENT.items():
        present = [spec.name for spec in dataclasses.fields(getattr(headrace, name)) if spec.name in fields.split()]
        assert present == fields.split(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = headrace.nonsense
