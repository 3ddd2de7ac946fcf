from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DropUserStateRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class DropUserStateResponse(_message.Message):
    __slots__ = ("dropped_entries",)
    DROPPED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    dropped_entries: int
    def __init__(self, dropped_entries: _Optional[int] = ...) -> None: ...
