"""New weights for an old plan: quicker than building, and the kernels stay as they were chosen."""

from __future__ import annotations

import logging
from pathlib import Path

from gr_trt.tensorrt.library import Library
from gr_trt.tensorrt.messages import make_log

logger = logging.getLogger(__name__)


def refit(library: Library, plan: bytes, graph: Path) -> bytes | None:
    """The plan with the weights of an ONNX graph of the same structure; None where it cannot be.

    It takes a GPU that the plan is for. Whoever gets None builds anew.
    """
    trt = library.module
    log = make_log(library)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None or not engine.refittable:
        logger.info("the plan built before cannot be refitted: %s", log.last_error())
        return None
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)):
        logger.info("%s: not refitted: %s", graph.name, log.last_error())
        return None
    if missing := list(refitter.get_missing_weights()):
        logger.info("%s: not refitted, without weights: %s", graph.name, ", ".join(missing[:3]))
        return None
    if not refitter.refit_cuda_engine():
        logger.info("%s: not refitted: %s", graph.name, log.last_error())
        return None
    config = engine.create_serialization_config()
    # Without it the weights that were refitted would be left out.
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    if hasattr(trt.SerializationFlag, "EXCLUDE_WEIGHTS"):
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    logger.info("%s: weights exchanged in a plan built before", graph.name)
    return bytes(memoryview(engine.serialize_with_config(config)).cast("B"))
