"""What the HTTP and the gRPC door tell about the model and the deployment. Nothing secret in any of it."""

from __future__ import annotations

from typing import Any

from configs.errors import ControlUnavailable, ServiceError
from deployments.core import ApiCore


def model_info(core: ApiCore) -> dict[str, Any]:
    """SGLang's /model_info."""
    card = core.card
    return {
        "model_path": card.path,
        "tokenizer_path": str(core.tokenizer.directory),
        "served_model_name": card.name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": card.weight_version,
        "model_type": card.model_type,
        "architectures": list(card.architectures),
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "context_length": core.max_len,
        "vocab_size": card.vocab_size,
        "eos_token_ids": list(card.eos_token_ids),
    }


async def server_info(core: ApiCore, version: str) -> dict[str, Any]:
    """Facts of the deployment; answers also while the controller is away, with what is known here."""
    try:
        info = await core.controller.info()
    except (ControlUnavailable, ServiceError) as error:
        info = {"success": False, "status": "unavailable", "message": error.message, "ranks": []}
    ranks = info.get("ranks") or []
    card = core.card
    return {
        "model_path": card.path,
        "tokenizer_path": str(core.tokenizer.directory),
        "served_model_name": card.name,
        "model_type": card.model_type,
        "architectures": list(card.architectures),
        "version": version,
        "weight_version": card.weight_version,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": max(len(ranks), len(core.fleet.members().members)),
        "load_balance_method": "longest_prefix_bounded_load",
        "disaggregation_mode": "null",
        "is_embedding": False,
        "context_length": core.max_len,
        "max_running_requests": sum(rank.get("max_running", 0) for rank in ranks),
        "max_total_num_tokens": sum(rank.get("num_pages", 0) * rank.get("page_size", 0) for rank in ranks),
        "max_req_input_len": core.max_len - 1,
        "page_size": ranks[0].get("page_size") if ranks else None,
        "internal_states": ranks,
        "control": {key: value for key, value in info.items() if key != "ranks"},
    }
