from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Version(_message.Message):
    __slots__ = ("major", "minor")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ...) -> None: ...

class FromAgent(_message.Message):
    __slots__ = ("hello", "heartbeat", "progress", "failure", "scores")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    progress: Progress
    failure: Failure
    scores: Scores
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., scores: _Optional[_Union[Scores, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "seats", "device", "memory", "hansa", "torch", "holding", "own")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HANSA_FIELD_NUMBER: _ClassVar[int]
    TORCH_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    version: Version
    seats: Seats
    device: str
    memory: int
    hansa: str
    torch: str
    holding: _containers.RepeatedScalarFieldContainer[bytes]
    own: bool
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., seats: _Optional[_Union[Seats, _Mapping]] = ..., device: _Optional[str] = ..., memory: _Optional[int] = ..., hansa: _Optional[str] = ..., torch: _Optional[str] = ..., holding: _Optional[_Iterable[bytes]] = ..., own: _Optional[bool] = ...) -> None: ...

class Seats(_message.Message):
    __slots__ = ("clients", "share", "of")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedScalarFieldContainer[int]
    share: int
    of: int
    def __init__(self, clients: _Optional[_Iterable[int]] = ..., share: _Optional[int] = ..., of: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("battery", "mains")
    BATTERY_FIELD_NUMBER: _ClassVar[int]
    MAINS_FIELD_NUMBER: _ClassVar[int]
    battery: float
    mains: bool
    def __init__(self, battery: _Optional[float] = ..., mains: _Optional[bool] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("lease", "steps")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    steps: int
    def __init__(self, lease: _Optional[bytes] = ..., steps: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("lease", "kind", "reason")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Failure.Kind]
        REFUSED: _ClassVar[Failure.Kind]
        FAILED: _ClassVar[Failure.Kind]
    UNSPECIFIED: Failure.Kind
    REFUSED: Failure.Kind
    FAILED: Failure.Kind
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    kind: Failure.Kind
    reason: str
    def __init__(self, lease: _Optional[bytes] = ..., kind: _Optional[_Union[Failure.Kind, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("lease", "examples", "loss", "accuracy")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    examples: int
    loss: float
    accuracy: float
    def __init__(self, lease: _Optional[bytes] = ..., examples: _Optional[int] = ..., loss: _Optional[float] = ..., accuracy: _Optional[float] = ...) -> None: ...

class ToAgent(_message.Message):
    __slots__ = ("welcome", "job", "recall", "pulse", "drain", "evaluation")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    PULSE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    job: Job
    recall: Recall
    pulse: Pulse
    drain: Drain
    evaluation: Job
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., job: _Optional[_Union[Job, _Mapping]] = ..., recall: _Optional[_Union[Recall, _Mapping]] = ..., pulse: _Optional[_Union[Pulse, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., evaluation: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "heartbeat", "name")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    version: Version
    heartbeat: float
    name: str
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., heartbeat: _Optional[float] = ..., name: _Optional[str] = ...) -> None: ...

class Pulse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Blob(_message.Message):
    __slots__ = ("digest", "size", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    data: bytes
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("lease", "run", "client", "number", "phase", "recipe", "payload", "tensors", "some", "keys", "clients", "undone")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SOME_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    UNDONE_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    run: str
    client: int
    number: int
    phase: str
    recipe: Blob
    payload: Blob
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    some: bool
    keys: _containers.RepeatedScalarFieldContainer[str]
    clients: int
    undone: int
    def __init__(self, lease: _Optional[bytes] = ..., run: _Optional[str] = ..., client: _Optional[int] = ..., number: _Optional[int] = ..., phase: _Optional[str] = ..., recipe: _Optional[_Union[Blob, _Mapping]] = ..., payload: _Optional[_Union[Blob, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., some: _Optional[bool] = ..., keys: _Optional[_Iterable[str]] = ..., clients: _Optional[int] = ..., undone: _Optional[int] = ...) -> None: ...

class Recall(_message.Message):
    __slots__ = ("lease", "partial")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    partial: bool
    def __init__(self, lease: _Optional[bytes] = ..., partial: _Optional[bool] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("lease", "digest", "offset")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    digest: str
    offset: int
    def __init__(self, lease: _Optional[bytes] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("manifest", "piece")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    piece: Piece
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("lease", "update", "tensors", "examples", "steps", "loss", "has_loss", "seconds")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    HAS_LOSS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    update: Blob
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    examples: int
    steps: int
    loss: float
    has_loss: bool
    seconds: float
    def __init__(self, lease: _Optional[bytes] = ..., update: _Optional[_Union[Blob, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., examples: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., has_loss: _Optional[bool] = ..., seconds: _Optional[float] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("permit", "acknowledgement")
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGEMENT_FIELD_NUMBER: _ClassVar[int]
    permit: Permit
    acknowledgement: Acknowledgement
    def __init__(self, permit: _Optional[_Union[Permit, _Mapping]] = ..., acknowledgement: _Optional[_Union[Acknowledgement, _Mapping]] = ...) -> None: ...

class Permit(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class Acknowledgement(_message.Message):
    __slots__ = ("counted",)
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    def __init__(self, counted: _Optional[bool] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("recipe", "wait_for", "key")
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    recipe: str
    wait_for: int
    key: str
    def __init__(self, recipe: _Optional[str] = ..., wait_for: _Optional[int] = ..., key: _Optional[str] = ...) -> None: ...

class RunName(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("run", "name", "arguments")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    arguments: str
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("id", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    after: int
    def __init__(self, id: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunList(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("id", "status", "reason", "rounds", "clients", "present", "directory", "owner", "name", "algorithm", "seed", "started", "planned", "accuracy", "best_accuracy", "time", "bytes_up", "bytes_down", "open")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    BEST_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: str
    reason: str
    rounds: int
    clients: int
    present: int
    directory: str
    owner: str
    name: str
    algorithm: str
    seed: str
    started: float
    planned: int
    accuracy: float
    best_accuracy: float
    time: float
    bytes_up: int
    bytes_down: int
    open: int
    def __init__(self, id: _Optional[str] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., rounds: _Optional[int] = ..., clients: _Optional[int] = ..., present: _Optional[int] = ..., directory: _Optional[str] = ..., owner: _Optional[str] = ..., name: _Optional[str] = ..., algorithm: _Optional[str] = ..., seed: _Optional[str] = ..., started: _Optional[float] = ..., planned: _Optional[int] = ..., accuracy: _Optional[float] = ..., best_accuracy: _Optional[float] = ..., time: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., open: _Optional[int] = ...) -> None: ...

class Happening(_message.Message):
    __slots__ = ("round", "end")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    round: Round
    end: RunStatus
    def __init__(self, round: _Optional[_Union[Round, _Mapping]] = ..., end: _Optional[_Union[RunStatus, _Mapping]] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("index", "time", "bytes_up", "bytes_down", "asked", "folded", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    index: int
    time: float
    bytes_up: int
    bytes_down: int
    asked: int
    folded: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, index: _Optional[int] = ..., time: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., asked: _Optional[int] = ..., folded: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RosterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("name", "connected", "device", "memory", "hansa", "torch", "protocol", "seats", "first", "seen", "attended", "battery", "mains", "jobs", "counted", "late", "failed", "refused", "bytes", "steps", "seconds", "revoked")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HANSA_FIELD_NUMBER: _ClassVar[int]
    TORCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_FIELD_NUMBER: _ClassVar[int]
    BATTERY_FIELD_NUMBER: _ClassVar[int]
    MAINS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    device: str
    memory: int
    hansa: str
    torch: str
    protocol: str
    seats: Seats
    first: float
    seen: float
    attended: float
    battery: float
    mains: bool
    jobs: _containers.RepeatedCompositeFieldContainer[OpenJob]
    counted: int
    late: int
    failed: int
    refused: int
    bytes: int
    steps: int
    seconds: float
    revoked: str
    def __init__(self, name: _Optional[str] = ..., connected: _Optional[bool] = ..., device: _Optional[str] = ..., memory: _Optional[int] = ..., hansa: _Optional[str] = ..., torch: _Optional[str] = ..., protocol: _Optional[str] = ..., seats: _Optional[_Union[Seats, _Mapping]] = ..., first: _Optional[float] = ..., seen: _Optional[float] = ..., attended: _Optional[float] = ..., battery: _Optional[float] = ..., mains: _Optional[bool] = ..., jobs: _Optional[_Iterable[_Union[OpenJob, _Mapping]]] = ..., counted: _Optional[int] = ..., late: _Optional[int] = ..., failed: _Optional[int] = ..., refused: _Optional[int] = ..., bytes: _Optional[int] = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ..., revoked: _Optional[str] = ...) -> None: ...

class OpenJob(_message.Message):
    __slots__ = ("run", "client", "number", "phase", "since")
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    run: str
    client: int
    number: int
    phase: str
    since: float
    def __init__(self, run: _Optional[str] = ..., client: _Optional[int] = ..., number: _Optional[int] = ..., phase: _Optional[str] = ..., since: _Optional[float] = ...) -> None: ...

class ConditionRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: float
    def __init__(self, after: _Optional[float] = ...) -> None: ...

class ConditionReply(_message.Message):
    __slots__ = ("hansa", "python", "torch", "platform", "protocol", "started", "secure", "cores", "memory", "samples")
    HANSA_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    TORCH_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    hansa: str
    python: str
    torch: str
    platform: str
    protocol: Version
    started: float
    secure: bool
    cores: int
    memory: int
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, hansa: _Optional[str] = ..., python: _Optional[str] = ..., torch: _Optional[str] = ..., platform: _Optional[str] = ..., protocol: _Optional[_Union[Version, _Mapping]] = ..., started: _Optional[float] = ..., secure: _Optional[bool] = ..., cores: _Optional[int] = ..., memory: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("at", "resident", "processor", "agents", "runs", "jobs", "uploads", "uploads_waiting", "messages_waiting", "events_waiting", "rounds", "counted", "late", "refused", "bytes_up", "bytes_down")
    AT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    PROCESSOR_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_WAITING_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_WAITING_FIELD_NUMBER: _ClassVar[int]
    EVENTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    at: float
    resident: int
    processor: float
    agents: int
    runs: int
    jobs: int
    uploads: int
    uploads_waiting: int
    messages_waiting: int
    events_waiting: int
    rounds: int
    counted: int
    late: int
    refused: int
    bytes_up: int
    bytes_down: int
    def __init__(self, at: _Optional[float] = ..., resident: _Optional[int] = ..., processor: _Optional[float] = ..., agents: _Optional[int] = ..., runs: _Optional[int] = ..., jobs: _Optional[int] = ..., uploads: _Optional[int] = ..., uploads_waiting: _Optional[int] = ..., messages_waiting: _Optional[int] = ..., events_waiting: _Optional[int] = ..., rounds: _Optional[int] = ..., counted: _Optional[int] = ..., late: _Optional[int] = ..., refused: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ...) -> None: ...
