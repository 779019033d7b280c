"""The models that this server accepts, in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api import examples
from api.batches import json_response
from api.intake import choose_model
from api.services import Services, ServicesDep
from headrace.schemas import ModelList, ModelOut

router = APIRouter(prefix="/v1/models", tags=["Models"])


@router.get("", response_model=ModelList, summary="List models", responses={200: examples.MODELS})
def list_models(services: ServicesDep) -> Response:
    """Return the models that a batch may name."""
    return json_response(ModelList(data=[_model(services, name) for name in services.settings.served_models]))


@router.get(
    "/{model:path}",
    response_model=ModelOut,
    summary="Look at a model",
    responses={200: examples.MODEL, **examples.problems(404)},
)
def get_model(model: str, services: ServicesDep) -> Response:
    """Return one model; its id may contain slashes."""
    return json_response(_model(services, choose_model(model, services.settings)))


def _model(services: Services, name: str) -> ModelOut:
    return ModelOut(id=name, created=services.started_at)
