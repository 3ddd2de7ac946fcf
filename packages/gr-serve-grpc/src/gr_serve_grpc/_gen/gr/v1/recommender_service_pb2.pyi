from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from gr_serve_grpc._gen.gr.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecommendRequest(_message.Message):
    __slots__ = ("request_id", "model", "version", "task", "history", "candidates", "k", "user_id", "user_features", "context_features", "request_time_ms", "include_seen", "exclude_item_ids", "head_weights", "history_handle")
    class UserFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _types_pb2.FeatureValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_types_pb2.FeatureValue, _Mapping]] = ...) -> None: ...
    class ContextFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _types_pb2.FeatureValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_types_pb2.FeatureValue, _Mapping]] = ...) -> None: ...
    class HeadWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    HEAD_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_HANDLE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    version: str
    task: _types_pb2.Task
    history: _types_pb2.History
    candidates: _types_pb2.Candidates
    k: int
    user_id: str
    user_features: _containers.MessageMap[str, _types_pb2.FeatureValue]
    context_features: _containers.MessageMap[str, _types_pb2.FeatureValue]
    request_time_ms: int
    include_seen: bool
    exclude_item_ids: _types_pb2.ItemIds
    head_weights: _containers.ScalarMap[str, float]
    history_handle: bytes
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., task: _Optional[_Union[_types_pb2.Task, str]] = ..., history: _Optional[_Union[_types_pb2.History, _Mapping]] = ..., candidates: _Optional[_Union[_types_pb2.Candidates, _Mapping]] = ..., k: _Optional[int] = ..., user_id: _Optional[str] = ..., user_features: _Optional[_Mapping[str, _types_pb2.FeatureValue]] = ..., context_features: _Optional[_Mapping[str, _types_pb2.FeatureValue]] = ..., request_time_ms: _Optional[int] = ..., include_seen: bool = ..., exclude_item_ids: _Optional[_Union[_types_pb2.ItemIds, _Mapping]] = ..., head_weights: _Optional[_Mapping[str, float]] = ..., history_handle: _Optional[bytes] = ...) -> None: ...

class RecommendResponse(_message.Message):
    __slots__ = ("request_id", "items", "heads", "stages", "features_seconds", "total_seconds", "unknown_items", "unscored_item_ids", "history_handle")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    UNSCORED_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_HANDLE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    items: _containers.RepeatedCompositeFieldContainer[RankedItem]
    heads: _containers.RepeatedScalarFieldContainer[str]
    stages: _containers.RepeatedCompositeFieldContainer[StageReport]
    features_seconds: float
    total_seconds: float
    unknown_items: int
    unscored_item_ids: _types_pb2.ItemIds
    history_handle: bytes
    def __init__(self, request_id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[RankedItem, _Mapping]]] = ..., heads: _Optional[_Iterable[str]] = ..., stages: _Optional[_Iterable[_Union[StageReport, _Mapping]]] = ..., features_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., unknown_items: _Optional[int] = ..., unscored_item_ids: _Optional[_Union[_types_pb2.ItemIds, _Mapping]] = ..., history_handle: _Optional[bytes] = ...) -> None: ...

class RankedItem(_message.Message):
    __slots__ = ("item_id", "score", "head_scores", "title")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    HEAD_SCORES_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    item_id: _types_pb2.ItemId
    score: float
    head_scores: _containers.RepeatedScalarFieldContainer[float]
    title: str
    def __init__(self, item_id: _Optional[_Union[_types_pb2.ItemId, _Mapping]] = ..., score: _Optional[float] = ..., head_scores: _Optional[_Iterable[float]] = ..., title: _Optional[str] = ...) -> None: ...

class StageReport(_message.Message):
    __slots__ = ("task", "model", "version", "engine", "queue_seconds", "compute_seconds", "batch_size", "tokens", "tokens_reused")
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REUSED_FIELD_NUMBER: _ClassVar[int]
    task: _types_pb2.Task
    model: str
    version: str
    engine: str
    queue_seconds: float
    compute_seconds: float
    batch_size: int
    tokens: int
    tokens_reused: int
    def __init__(self, task: _Optional[_Union[_types_pb2.Task, str]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., engine: _Optional[str] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., batch_size: _Optional[int] = ..., tokens: _Optional[int] = ..., tokens_reused: _Optional[int] = ...) -> None: ...

class RecommendStreamRequest(_message.Message):
    __slots__ = ("request", "timeout")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    request: RecommendRequest
    timeout: _duration_pb2.Duration
    def __init__(self, request: _Optional[_Union[RecommendRequest, _Mapping]] = ..., timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RecommendStreamResponse(_message.Message):
    __slots__ = ("request_id", "response", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    response: RecommendResponse
    error: _status_pb2.Status
    def __init__(self, request_id: _Optional[str] = ..., response: _Optional[_Union[RecommendResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "default", "stages", "versions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    default: bool
    stages: _containers.RepeatedCompositeFieldContainer[ModelStage]
    versions: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, name: _Optional[str] = ..., default: bool = ..., stages: _Optional[_Iterable[_Union[ModelStage, _Mapping]]] = ..., versions: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class ModelStage(_message.Message):
    __slots__ = ("task", "model")
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    task: _types_pb2.Task
    model: str
    def __init__(self, task: _Optional[_Union[_types_pb2.Task, str]] = ..., model: _Optional[str] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("model", "version", "active", "architecture", "plans", "heads", "catalogue_size", "description", "notes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_SIZE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    active: bool
    architecture: str
    plans: _containers.RepeatedCompositeFieldContainer[TaskPlan]
    heads: _containers.RepeatedScalarFieldContainer[str]
    catalogue_size: int
    description: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., active: bool = ..., architecture: _Optional[str] = ..., plans: _Optional[_Iterable[_Union[TaskPlan, _Mapping]]] = ..., heads: _Optional[_Iterable[str]] = ..., catalogue_size: _Optional[int] = ..., description: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class TaskPlan(_message.Message):
    __slots__ = ("task", "engine", "explanation")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    task: _types_pb2.Task
    engine: str
    explanation: str
    def __init__(self, task: _Optional[_Union[_types_pb2.Task, str]] = ..., engine: _Optional[str] = ..., explanation: _Optional[str] = ...) -> None: ...
