from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_RETRIEVE: _ClassVar[Task]
    TASK_RANK: _ClassVar[Task]
    TASK_GENERATE: _ClassVar[Task]
TASK_UNSPECIFIED: Task
TASK_RETRIEVE: Task
TASK_RANK: Task
TASK_GENERATE: Task

class Int64Column(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class FloatColumn(_message.Message):
    __slots__ = ("values", "missing")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[float]] = ..., missing: _Optional[_Iterable[int]] = ...) -> None: ...

class StringColumn(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class ItemId(_message.Message):
    __slots__ = ("integer", "text")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    integer: int
    text: str
    def __init__(self, integer: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class ItemIds(_message.Message):
    __slots__ = ("integers", "texts")
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    integers: Int64Column
    texts: StringColumn
    def __init__(self, integers: _Optional[_Union[Int64Column, _Mapping]] = ..., texts: _Optional[_Union[StringColumn, _Mapping]] = ...) -> None: ...

class Behaviour(_message.Message):
    __slots__ = ("item_id", "timestamp_ms", "signals")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_MS_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    item_id: ItemId
    timestamp_ms: int
    signals: _containers.ScalarMap[str, float]
    def __init__(self, item_id: _Optional[_Union[ItemId, _Mapping]] = ..., timestamp_ms: _Optional[int] = ..., signals: _Optional[_Mapping[str, float]] = ...) -> None: ...

class BehaviourRows(_message.Message):
    __slots__ = ("behaviours",)
    BEHAVIOURS_FIELD_NUMBER: _ClassVar[int]
    behaviours: _containers.RepeatedCompositeFieldContainer[Behaviour]
    def __init__(self, behaviours: _Optional[_Iterable[_Union[Behaviour, _Mapping]]] = ...) -> None: ...

class BehaviourColumns(_message.Message):
    __slots__ = ("item_ids", "timestamps_ms", "signals")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FloatColumn
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FloatColumn, _Mapping]] = ...) -> None: ...
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_MS_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    item_ids: ItemIds
    timestamps_ms: Int64Column
    signals: _containers.MessageMap[str, FloatColumn]
    def __init__(self, item_ids: _Optional[_Union[ItemIds, _Mapping]] = ..., timestamps_ms: _Optional[_Union[Int64Column, _Mapping]] = ..., signals: _Optional[_Mapping[str, FloatColumn]] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("rows", "columns")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    rows: BehaviourRows
    columns: BehaviourColumns
    def __init__(self, rows: _Optional[_Union[BehaviourRows, _Mapping]] = ..., columns: _Optional[_Union[BehaviourColumns, _Mapping]] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("item_ids", "features")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FloatColumn
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FloatColumn, _Mapping]] = ...) -> None: ...
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    item_ids: ItemIds
    features: _containers.MessageMap[str, FloatColumn]
    def __init__(self, item_ids: _Optional[_Union[ItemIds, _Mapping]] = ..., features: _Optional[_Mapping[str, FloatColumn]] = ...) -> None: ...

class FeatureValue(_message.Message):
    __slots__ = ("integer", "number", "text")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    integer: int
    number: float
    text: str
    def __init__(self, integer: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...
