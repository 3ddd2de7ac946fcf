"""The Python models of a repository, as Triton's Python backend calls them.

Each ``model.py`` of a repository imports its class from here, so this module runs in the Python
environment of the server, where Triton provides ``triton_python_backend_utils``. Mistakes of users
become errors of the request; faults are logged with their traceback and answered without it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import EncodedRequest, Engine, InferenceResult, Model
from gr_core.errors import GrError, InvalidRequest, UserError, Violation
from gr_trt.triton.features import Row
from gr_trt.triton.layout import ANSWER, REQUEST
from gr_trt.triton.loading import (
    load_answers,
    load_engine,
    load_features,
    load_model,
    platform_engine,
)

Array = npt.NDArray[Any]


def _triton() -> Any:
    """Triton's module, which is there only in a process of its Python backend."""
    return import_module("triton_python_backend_utils")


class _ToTriton(logging.Handler):
    """Hands what the platform logs to Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = _triton().Logger
        write = logger.log_info
        if record.levelno >= logging.WARNING:
            write = logger.log_warn if record.levelno < logging.ERROR else logger.log_error
        write(self.format(record))


class _Step:
    """What all steps share."""

    def initialize(self, args: Mapping[str, str]) -> None:
        handler = _ToTriton(logging.INFO)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger("gr_core").handlers = [handler]
        logging.getLogger("gr_trt").handlers = [handler]
        logging.getLogger("gr_core").setLevel(logging.INFO)
        logging.getLogger("gr_trt").setLevel(logging.INFO)
        self._name = args["model_name"]
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self._model = load_model(folder)
            self._load(folder, args)
        except GrError as error:
            # Triton shows the message alone where there is no traceback to show.
            raise _triton().TritonModelException(str(error)) from None

    def _load(self, folder: Path, args: Mapping[str, str]) -> None:
        raise NotImplementedError

    def finalize(self) -> None:
        if isinstance(getattr(self, "_model", None), Model):
            self._model.close()

    def _refused(self, error: Exception) -> Any:
        """A response that says what is wrong."""
        triton = _triton()
        code = triton.TritonError.INVALID_ARG
        message = str(error)
        if not isinstance(error, UserError):
            code = triton.TritonError.INTERNAL
            message = f"{self._name}: {type(error).__name__}: a fault, see the server's log"
            triton.Logger.log_error(f"{self._name}: {''.join(traceback.format_exception(error))}")
        return triton.InferenceResponse(error=triton.TritonError(message, code))


class FeaturesModel(_Step):
    """Requests in JSON to arrays."""

    def _load(self, folder: Path, args: Mapping[str, str]) -> None:
        self._features = load_features(folder, self._model)

    def execute(self, requests: Sequence[Any]) -> Sequence[Any]:
        return [self._answered(request) for request in requests]

    def _answered(self, request: Any) -> Any:
        triton = _triton()
        try:
            texts = triton.get_input_tensor_by_name(request, REQUEST).as_numpy()[:, 0]
            rows = [self._row(text, i, len(texts)) for i, text in enumerate(texts)]
            made = self._features.tensors(rows)
            wanted = request.requested_output_names()
            return _response({name: made[name] for name in wanted})
        except Exception as error:
            return self._refused(error)

    def _row(self, text: bytes, place: int, count: int) -> Row:
        try:
            return self._features.row(text)
        except InvalidRequest as error:
            if count == 1:
                raise
            where = f"request[{place}]"
            raise InvalidRequest(
                [Violation(f"{where}: {v.field}", v.message) for v in error.violations]
            ) from None


class EngineModel(_Step):
    """Arrays to scores, by the platform's own engine; all requests that are there in one batch."""

    def _load(self, folder: Path, args: Mapping[str, str]) -> None:
        device = "cpu"
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        self._engine: Engine = platform_engine()
        self._step = load_engine(folder, self._model, device, self._engine)

    def execute(self, requests: Sequence[Any]) -> Sequence[Any]:
        read: list[Sequence[EncodedRequest]] = [self._step.requests(_inputs(r)) for r in requests]
        try:
            found = iter(self._step.compute([one for rows in read for one in rows]))
            results: Sequence[Any] = [[next(found) for _ in rows] for rows in read]
        except Exception as error:
            # Each alone, so that a poisoned one fails alone.
            results = [self._alone(rows) for rows in read] if len(read) > 1 else [error]
        return [self._response(one) for one in results]

    def _alone(self, rows: Sequence[EncodedRequest]) -> Sequence[InferenceResult] | Exception:
        try:
            return self._step.compute(rows)
        except Exception as error:
            return error

    def _response(self, results: Sequence[InferenceResult] | Exception) -> Any:
        if isinstance(results, Exception):
            return self._refused(results)
        return _response(self._step.tensors(results))

    def finalize(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
        super().finalize()


class AnswerModel(_Step):
    """Scores to answers in JSON."""

    def _load(self, folder: Path, args: Mapping[str, str]) -> None:
        self._answers = load_answers(folder, self._model)

    def execute(self, requests: Sequence[Any]) -> Sequence[Any]:
        return [self._answered(request) for request in requests]

    def _answered(self, request: Any) -> Any:
        try:
            texts = self._answers.texts(_inputs(request))
            return _response({ANSWER: np.array([[text] for text in texts], np.object_)})
        except Exception as error:
            return self._refused(error)


def _inputs(request: Any) -> Mapping[str, Array]:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def _response(tensors: Mapping[str, Array]) -> Any:
    triton = _triton()
    return triton.InferenceResponse(
        [triton.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]
    )
