"""What can be done to a server, from where, and where it ends. One row a verb; everything else reads it.

The claim's SQL, the sentence of the 409, the documents' allowed states, the diagram and the test that walks at
random are readings of this table.  Words as the Compute API shows them (vm_state, task_state, power_state).
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class VM(StrEnum):
    """vm_state: what a server is when nobody works on it."""

    building = "building"
    active = "active"
    paused = "paused"
    suspended = "suspended"
    stopped = "stopped"
    rescued = "rescued"
    resized = "resized"
    soft_deleted = "soft-delete"
    deleted = "deleted"
    error = "error"
    shelved = "shelved"
    shelved_offloaded = "shelved_offloaded"


class Task(StrEnum):
    """task_state: what is being done to it; None when idle."""

    scheduling = "scheduling"
    networking = "networking"
    block_device_mapping = "block_device_mapping"
    spawning = "spawning"
    image_snapshot_pending = "image_snapshot_pending"
    image_snapshot = "image_snapshot"
    image_pending_upload = "image_pending_upload"
    image_uploading = "image_uploading"
    image_backup = "image_backup"
    rebooting = "rebooting"
    reboot_pending = "reboot_pending"
    reboot_started = "reboot_started"
    rebooting_hard = "rebooting_hard"
    reboot_pending_hard = "reboot_pending_hard"
    reboot_started_hard = "reboot_started_hard"
    powering_off = "powering-off"
    powering_on = "powering-on"
    pausing = "pausing"
    unpausing = "unpausing"
    suspending = "suspending"
    resuming = "resuming"
    updating_password = "updating_password"
    rescuing = "rescuing"
    unrescuing = "unrescuing"
    rebuilding = "rebuilding"
    rebuild_block_device_mapping = "rebuild_block_device_mapping"
    rebuild_spawning = "rebuild_spawning"
    resize_prep = "resize_prep"
    resize_migrating = "resize_migrating"
    resize_migrated = "resize_migrated"
    resize_finish = "resize_finish"
    resize_reverting = "resize_reverting"
    resize_confirming = "resize_confirming"
    migrating = "migrating"
    deleting = "deleting"
    soft_deleting = "soft-deleting"
    restoring = "restoring"
    shelving = "shelving"
    shelving_image_pending_upload = "shelving_image_pending_upload"
    shelving_image_uploading = "shelving_image_uploading"
    shelving_offloading = "shelving_offloading"
    unshelving = "unshelving"


class PowerState(IntEnum):
    """power_state: what the hypervisor says."""

    nostate = 0
    running = 1
    paused = 3
    shutdown = 4
    crashed = 6
    suspended = 7


@dataclass(frozen=True)
class Verb:
    """A row. `over`: the running tasks that it may interrupt; None: whatever runs.

    `op` is the word of the 409 sentence; `action` the instance action's name; `host` whether a host must be set.
    `busy` None: users see it idle meanwhile; its run is alone with the server all the same.
    """

    name: str
    start: frozenset[VM]
    busy: Task | None
    end: VM | None  # None: as it was
    op: str = ""
    action: str = ""
    over: frozenset[Task] | None = frozenset()
    lock: bool = True
    launched: bool = True
    host: bool = False
    message: str = ""  # compute.Power's `to`, for verbs that need no flow of their own

    def __str__(self) -> str:
        return self.name


def _vm(text: str) -> frozenset[VM]:
    return frozenset(VM) if text == "any" else frozenset(VM(t) for t in text.split())


_REBOOTS = frozenset(
    {
        Task.rebooting,
        Task.reboot_pending,
        Task.reboot_started,
        Task.rebooting_hard,
        Task.resuming,
        Task.unpausing,
        Task.pausing,
        Task.suspending,
    }
)

_VOLUMES = "active paused stopped resized soft-delete shelved shelved_offloaded"  # may come and go

# Whatever runs may be overtaken, but not the server's end, nor the same again, nor what takes it off its host: that ends
# by itself where the host is gone, and then it can be asked again.
_LIVING = frozenset(Task) - {
    Task.deleting,
    Task.soft_deleting,
    Task.rebuilding,
    Task.shelving,
    Task.shelving_image_pending_upload,
    Task.shelving_image_uploading,
    Task.shelving_offloading,
    Task.unshelving,
}

# fmt: off
VERBS: dict[str, Verb] = {v.name: v for v in (
    #    verb           from                                          busy as              ends as
    Verb("start",       _vm("stopped"),                               Task.powering_on,    VM.active,    "start",   "start",   host=True, message="start"),
    Verb("stop",        _vm("active error"),                          Task.powering_off,   VM.stopped,   "stop",    "stop",    host=True, message="stop"),
    Verb("reboot",      _vm("active"),                                Task.rebooting,      VM.active,    "reboot",  "reboot",  host=True, message="reboot"),
    Verb("hard_reboot", _vm("active stopped paused suspended error"), Task.rebooting_hard, VM.active,    "reboot",  "reboot",  over=_REBOOTS, host=True, message="hard_reboot"),
    Verb("pause",       _vm("active"),                                Task.pausing,        VM.paused,    "pause",   "pause",   host=True, message="pause"),
    Verb("unpause",     _vm("paused"),                                Task.unpausing,      VM.active,    "unpause", "unpause", host=True, message="unpause"),
    Verb("suspend",     _vm("active"),                                Task.suspending,     VM.suspended, "suspend", "suspend", host=True, message="suspend"),
    Verb("resume",      _vm("suspended"),                             Task.resuming,       VM.active,    "resume",  "resume",  host=True, message="resume"),
    Verb("attach_interface", _vm("active paused stopped"),            None,                None,         "attach_interface", "attach_interface", host=True),
    Verb("detach_interface", _vm("active paused stopped"),            None,                None,         "detach_interface", "detach_interface", host=True),
    Verb("attach_volume",    _vm(_VOLUMES),                           None,                None,         "attach_volume", "attach_volume"),
    Verb("detach_volume",    _vm(_VOLUMES),                           None,                None,         "detach_volume", "detach_volume"),
    Verb("swap_volume",      _vm("active paused resized"),            None,                None,         "swap_volume",   "swap_volume", host=True),
    Verb("attach_share",     _vm("stopped"),                          None,                None,         "attach_share", "attach_share", over=None, lock=False, launched=False, host=True),
    Verb("detach_share",     _vm("stopped error"),                    None,                None,         "detach_share", "detach_share", over=None, lock=False, launched=False),
    Verb("delete",      frozenset(VM) - {VM.deleted},                 Task.deleting,       VM.deleted,   "delete",  "delete",  over=None, launched=False),
    # moves: `api/moves.py`
    Verb("resize",      _vm("active stopped"),                        Task.resize_prep,    VM.resized,   "resize",  "resize",  host=True),
    Verb("migrate",     _vm("active stopped"),                        Task.resize_prep,    VM.resized,   "migrate", "migrate", host=True),
    Verb("confirm",     _vm("resized"),                               Task.resize_confirming, None,      "confirmResize", "confirmResize"),
    Verb("revert",      _vm("resized"),                               Task.resize_reverting, None,       "revertResize", "revertResize"),
    Verb("live_migrate", _vm("active paused"),                        Task.migrating,      None,         "os-migrateLive", "live-migration", host=True),
    Verb("evacuate",    _vm("active stopped error"),                  Task.rebuilding,     None,         "evacuate", "evacuate", over=_LIVING, host=True),
    Verb("force_delete", frozenset(VM) - {VM.deleted},                Task.deleting,       VM.deleted,   "forceDelete", "delete", over=None, launched=False),
    Verb("soft_delete", frozenset(VM) - {VM.deleted},                 Task.soft_deleting,  VM.soft_deleted, "delete", "delete", over=None),
    Verb("restore",     _vm("soft-delete"),                           Task.restoring,      VM.active,    "restore", "restore", host=True),
    Verb("snapshot",    _vm("active stopped paused suspended"),       Task.image_snapshot_pending, None, "createImage", "createImage", lock=False, host=True),
    Verb("backup",      _vm("active stopped paused suspended"),       Task.image_backup,   None,         "createBackup", "createBackup", lock=False, host=True),
    Verb("rebuild",     _vm("active stopped error"),                  Task.rebuilding,     VM.active,    "rebuild", "rebuild", host=True),
    Verb("rescue",      _vm("active stopped error"),                  Task.rescuing,       VM.rescued,   "rescue",  "rescue",  host=True),
    Verb("unrescue",    _vm("rescued"),                               Task.unrescuing,     VM.active,    "unrescue", "unrescue", host=True),
    Verb("crash_dump",  _vm("active paused rescued resized error"),   None,                None,         "trigger_crash_dump", "trigger_crash_dump", host=True),
    Verb("shelve",      _vm("active stopped paused suspended"),       Task.shelving,       VM.shelved,   "shelve",  "shelve",  host=True),
    Verb("offload",     _vm("shelved"),                               Task.shelving_offloading, VM.shelved_offloaded, "shelveOffload", "shelveOffload", host=True),
    Verb("unshelve",    _vm("shelved shelved_offloaded"),             Task.unshelving,     VM.active,    "unshelve", "unshelve"),
    Verb("password",    _vm("active"),                                Task.updating_password, None,      "changePassword", "changePassword", host=True),
)}
# fmt: on


# ---- the API's status: a word for (vm_state, task_state)

_RESIZE = dict.fromkeys((Task.resize_prep, Task.resize_migrating, Task.resize_migrated, Task.resize_finish), "RESIZE")
_REBUILD = dict.fromkeys((Task.rebuilding, Task.rebuild_block_device_mapping, Task.rebuild_spawning), "REBUILD")
STATUS: dict[VM, tuple[str, dict[Task, str]]] = {
    VM.active: (
        "ACTIVE",
        dict.fromkeys((Task.rebooting, Task.reboot_pending, Task.reboot_started), "REBOOT")
        | dict.fromkeys((Task.rebooting_hard, Task.reboot_pending_hard, Task.reboot_started_hard), "HARD_REBOOT")
        | {Task.updating_password: "PASSWORD", Task.migrating: "MIGRATING"}
        | _REBUILD
        | _RESIZE,
    ),
    VM.building: ("BUILD", {}),
    VM.stopped: ("SHUTOFF", _RESIZE | _REBUILD),
    VM.resized: ("VERIFY_RESIZE", {Task.resize_reverting: "REVERT_RESIZE"}),
    VM.paused: ("PAUSED", {Task.migrating: "MIGRATING"}),
    VM.suspended: ("SUSPENDED", {}),
    VM.rescued: ("RESCUE", {}),
    VM.error: ("ERROR", _REBUILD),
    VM.deleted: ("DELETED", {}),
    VM.soft_deleted: ("SOFT_DELETED", {}),
    VM.shelved: ("SHELVED", {}),
    VM.shelved_offloaded: ("SHELVED_OFFLOADED", {}),
}


def status(vm_state: str, task_state: str | None) -> str:
    """As users know it: ACTIVE, BUILD, SHUTOFF … (Compute API, server status)."""
    known, exceptions = STATUS[VM(vm_state)]
    return exceptions.get(Task(task_state), known) if task_state else known


def states_of(wanted: str) -> dict[VM, frozenset[Task] | None]:
    """Which states give this status: for each vm_state the tasks, None where the task does not matter."""
    found: dict[VM, frozenset[Task] | None] = {}
    for vm, (default, exceptions) in STATUS.items():
        if default == wanted.upper():
            found[vm] = None
        elif tasks := frozenset(t for t, s in exceptions.items() if s == wanted.upper()):
            found[vm] = tasks
    return found
