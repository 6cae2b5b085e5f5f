"""Everything an operator can choose, with its default. `kit/config.py` reads it; `docs/how/an-option.md` adds to it.

A default is what suits one machine and somebody who has read nothing.  `None` means that the value follows from
something else, and the description says from what.
"""

from pathlib import Path
from typing import Annotated as A
from typing import Literal

from msgspec import Struct

from kilonova.kit.config import Meta, Secret

Port = A[int, Meta(ge=0, le=65535)]


class Api(Struct, frozen=True):
    """The one door of the cloud: compute under `/compute`, its companions beside it."""

    host: A[str, Meta(description="Address to listen on. Others than loopback let the network in.")] = "127.0.0.1"
    port: A[Port, Meta(description="TCP port to listen on; 0 takes one that is free.")] = 8774
    threads: A[int, Meta(description="Requests answered at the same time by a process.", ge=1, le=1024)] = 8
    share_port: A[
        bool,
        Meta(description="Let several processes of one user listen on the same port; each has its share of who comes."),
    ] = False
    public_url: A[
        str | None,
        Meta(
            description="What clients call this cloud, as it stands in the catalog; unset, it follows from host and port.",
            examples=["https://cloud.example.org"],
        ),
    ] = None
    compute_link_prefix: A[
        str | None,
        Meta(
            description="Begins the links in answers of the Compute API, when a proxy changes them; unset, the request's own.",
            examples=["https://cloud.example.org/compute"],
        ),
    ] = None
    image_link_prefix: A[
        str | None,
        Meta(description="The same for links to images.", examples=["https://cloud.example.org/image"]),
    ] = None
    max_limit: A[int, Meta(description="The most rows in a page of a list.", ge=1)] = 1000
    max_request_body_bytes: A[
        int, Meta(description="A longer request is refused with 413. Image uploads have their own limit.", ge=1024)
    ] = 114_688
    enable_instance_password: A[
        bool, Meta(description="Show the generated admin password in the answer to create, rebuild, rescue, evacuate.")
    ] = True
    password_length: A[int, Meta(description="Letters in a generated admin password.", ge=8, le=128)] = 12
    default_availability_zone: A[str, Meta(description="The zone of hosts in no aggregate with one.")] = "nova"
    internal_availability_zone: A[str, Meta(description="The zone shown for services that are no hosts.")] = "internal"
    default_schedule_zone: A[
        str | None, Meta(description="The zone for servers that ask for none; unset, any.", examples=["nova"])
    ] = None
    hide_server_address_states: A[
        tuple[str, ...], Meta(description="States (`building`) in which a server's addresses are not shown.")
    ] = ()


class Database(Struct, frozen=True):
    """Where the truth lies."""

    url: A[
        Secret,
        Meta(
            description="`postgresql+psycopg://user:password@host/name`, `mysql+pymysql://…` or `sqlite:////path`; "
            "unset, a SQLite file in the state directory.",
            examples=["postgresql+psycopg://kilonova:password@db.example.org/kilonova"],
        ),
    ] = Secret()
    connections: A[int, Meta(description="The most connections a process keeps open.", ge=2)] = 16


class Bus(Struct, frozen=True):
    """What carries letters between the processes of `kilonova serve`: RabbitMQ. `up` is one process and needs none."""

    url: A[
        Secret,
        Meta(
            description="`amqp://user:password@host:port/vhost`, or `amqps://` for TLS; several, one behind the other with "
            "a semicolon between them, are tried in turn.",
            examples=["amqp://kilonova:password@mq1.example.org//;amqp://kilonova:password@mq2.example.org//"],
        ),
    ] = Secret()
    prefix: A[str, Meta(description="Begins the names of its queues: clouds that share a broker have one each.")] = (
        "kilonova"
    )
    heartbeat_s: A[float, Meta(description="A broker or process that is silent for so long is gone.", ge=1)] = 15.0
    ca_file: A[
        Path | None,
        Meta(
            description="With `amqps://`: whose certificates brokers may have; unset, those that this machine trusts.",
            examples=["/etc/kilonova/ca.pem"],
        ),
    ] = None
    cert_file: A[
        Path | None, Meta(description="Our own, where the broker asks for one.", examples=["/etc/kilonova/bus.pem"])
    ] = None
    key_file: A[Path | None, Meta(description="Its key.", examples=["/etc/kilonova/bus.key"])] = None


class State(Struct, frozen=True):
    """What this machine keeps on its own disk: disks of servers, images, keys, the SQLite file."""

    directory: A[
        Path | None,
        Meta(
            description="Unset, `kilonova` in the user's state home (`$XDG_STATE_HOME`, `~/.local/state`).",
            examples=["/var/lib/kilonova"],
        ),
    ] = None


class Quota(Struct, frozen=True):
    """What a project may have when neither it nor the class `default` has limits of its own; -1 is no limit."""

    instances: A[int, Meta(description="Servers of a project.", ge=-1)] = 10
    cores: A[int, Meta(description="Virtual CPUs of a project's servers together.", ge=-1)] = 20
    ram: A[int, Meta(description="Memory of a project's servers together, in MB.", ge=-1)] = 51_200
    key_pairs: A[int, Meta(description="Key pairs of a user.", ge=-1)] = 100
    metadata_items: A[int, Meta(description="Metadata of one server.", ge=-1)] = 128
    server_groups: A[int, Meta(description="Server groups of a project.", ge=-1)] = 10
    server_group_members: A[int, Meta(description="Servers of one group.", ge=-1)] = 10
    injected_files: A[int, Meta(description="Files given with one request (until 2.56).", ge=-1)] = 5
    injected_file_content_bytes: A[int, Meta(description="Length of one such file.", ge=-1)] = 10_240
    injected_file_path_length: A[int, Meta(description="Length of its path.", ge=-1)] = 255


class UnifiedLimits(Struct, frozen=True):
    """Limits that the identity service keeps, in place of those in [quota] and of quota sets."""

    enabled: A[
        bool, Meta(description="Ask the identity service; quota sets show what it says, and change nothing.")
    ] = False
    resources: A[tuple[str, ...], Meta(description="Resources that the next option is about.")] = ("servers",)
    strategy: A[
        Literal["require", "ignore"],
        Meta(
            description="Of resources that have no registered limit: those that are named are refused and others are not "
            "looked at (require), or the other way round (ignore)."
        ),
    ] = "require"


class Compute(Struct, frozen=True):
    """A host that runs servers."""

    host: A[str | None, Meta(description="Its name in the cloud; unset, the machine's own.", examples=["host-1"])] = (
        None
    )
    address: A[
        str | None,
        Meta(
            description="Its IP address, for other hosts and volume services; unset, the one that leads to the broker.",
            examples=["192.0.2.11"],
        ),
    ] = None
    console_port: A[
        Port,
        Meta(
            description="Where the consoles of a fleet's host are reached by proxies, at its address; 0, any that is free."
        ),
    ] = 0
    driver: A[
        Literal["libvirt", "sim"], Meta(description="What runs the servers: QEMU/KVM by libvirt, or only make-believe.")
    ] = "libvirt"
    reserved_cpus: A[int, Meta(description="CPUs kept for the host itself.", ge=0)] = 0
    reserved_memory_mb: A[int, Meta(description="Memory kept for the host itself.", ge=0)] = 512
    reserved_disk_mb: A[int, Meta(description="Disk kept for the host itself.", ge=0)] = 0
    cpu_allocation_ratio: A[float, Meta(description="Virtual CPUs given out for each real one.", gt=0)] = 4.0
    cpu_dedicated_set: A[
        str,
        Meta(description="CPUs that servers with `hw:cpu_policy` get for themselves (PCPU).", examples=["4-15,^8"]),
    ] = ""
    cpu_shared_set: A[
        str,
        Meta(
            description="CPUs that all other servers share (VCPU); unset, those that are not dedicated.",
            examples=["0-3"],
        ),
    ] = ""
    memory_allocation_ratio: A[float, Meta(description="Memory given out for each MB there is.", gt=0)] = 1.0
    disk_allocation_ratio: A[float, Meta(description="Disk given out for each GB there is.", gt=0)] = 1.0
    shutdown_timeout_s: A[
        int, Meta(description="How long a guest may take to end itself before it is switched off.", ge=0)
    ] = 60
    detach_timeout_s: A[
        int, Meta(description="How long a guest may take to let go of a device that is unplugged.", ge=0)
    ] = 60
    console_log_max_bytes: A[
        int, Meta(description="How much of a server's console is kept; the oldest goes first.", ge=4096)
    ] = 1_048_576
    image_cache_max_age_s: A[
        int, Meta(description="An image no server uses is kept so long on a host; -1 keeps it for ever.", ge=-1)
    ] = 86_400
    report_interval_s: A[float, Meta(description="How often a host says what it has and runs.", gt=0)] = 10.0
    host_down_after_s: A[float, Meta(description="A host that has said nothing for so long is down.", gt=0)] = 60.0
    power_sync_interval_s: A[
        float, Meta(description="How often the real power state of all servers is compared with what is written.", gt=0)
    ] = 60.0
    resume_servers_on_start: A[
        bool, Meta(description="After a reboot of the host, start the servers that were running.")
    ] = True
    build_failures_max: A[
        int, Meta(description="Builds that may fail one after another before other hosts are preferred; 0 never.", ge=0)
    ] = 10
    max_concurrent_builds: A[int, Meta(description="Servers a host builds at the same time; 0 is no limit.", ge=0)] = 10
    local_disks_max: A[
        int, Meta(description="Local disks that a new server may be described with; -1 is no limit.", ge=-1)
    ] = 3
    disks_max: A[int, Meta(description="Disks of a server when a volume is attached; -1 is no limit.", ge=-1)] = -1
    force_config_drive: A[bool, Meta(description="Give every server a config drive.")] = False
    config_drive_format: A[Literal["iso9660", "vfat"], Meta(description="The file system of config drives.")] = (
        "iso9660"
    )
    reclaim_interval_s: A[
        int, Meta(description="Deleted servers can be restored for so long; 0 deletes at once.", ge=0)
    ] = 0
    shelved_offload_time_s: A[
        int,
        Meta(description="How long a shelved server keeps its place on its host; 0 not at all, -1 for ever.", ge=-1),
    ] = 0
    rescue_image: A[
        str | None,
        Meta(
            description="The image that servers are rescued with where none is named; unset, the one that each was made of.",
            examples=["7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"],
        ),
    ] = None
    allow_resize_to_same_host: A[
        bool | None,
        Meta(
            description="A resize may leave a server where it is; a cold migration never does. Unset: only where the cloud is "
            "one process with one host.",
            examples=[True],
        ),
    ] = None
    resize_confirm_window_s: A[
        int, Meta(description="A resize that nobody confirms or reverts is confirmed after so long; 0 never.", ge=0)
    ] = 0
    max_concurrent_live_migrations: A[
        int, Meta(description="Servers that leave a host at the same time while they run; 0 is no limit.", ge=0)
    ] = 1
    lost_server: A[
        Literal["log", "stop", "destroy"],
        Meta(description="What is done with a machine on a host that no server owns."),
    ] = "destroy"


class Libvirt(Struct, frozen=True):
    """How a host uses QEMU."""

    uri: A[
        str | None,
        Meta(
            description="A libvirtd that runs; unset, one of our own is started.",
            examples=["qemu:///system"],
        ),
    ] = None
    virt_type: A[
        Literal["auto", "kvm", "qemu"],
        Meta(description="`auto` proves KVM with a probe guest and else emulates (`qemu`), which is slower."),
    ] = "auto"
    cpu_mode: A[
        Literal["auto", "host-model", "host-passthrough", "maximum", "custom", "none"],
        Meta(description="The CPU a guest sees; `auto` is host-model with KVM and maximum without."),
    ] = "auto"
    cpu_models: A[
        tuple[str, ...], Meta(description="With `custom`: models, the first that the host can is taken.")
    ] = ()
    machine_type: A[str, Meta(description="QEMU's machine where the image asks for none.")] = "q35"
    disk_cache: A[
        Literal["none", "writeback", "writethrough", "directsync", "unsafe"],
        Meta(description="How the host caches servers' disks."),
    ] = "writeback"
    hotplug_slots: A[int, Meta(description="PCIe slots kept for what is attached later.", ge=0, le=28)] = 8
    tcg_cache_mb: A[int, Meta(description="Memory for translated code of an emulated guest.", ge=16)] = 64
    migration_address: A[
        str | None,
        Meta(
            description="The address (of the network between hosts) at which others fetch the disks of servers that are moved "
            "to them; unset, servers neither leave this host nor come to it.",
            examples=["192.0.2.11"],
        ),
    ] = None
    migration_port: A[
        int, Meta(description="The first of the 64 ports that are used there; 0: any that is free.", ge=0, le=65472)
    ] = 49152
    call_timeout_s: A[float, Meta(description="A call to libvirt that takes longer counts as lost.", gt=0)] = 60.0


class Sim(Struct, frozen=True):
    """Hosts that only exist in memory."""

    seed: A[int, Meta(description="The dice they are thrown with.", ge=0)] = 1
    hosts: A[int, Meta(description="How many.", ge=1)] = 1
    directory: A[
        Path | None,
        Meta(
            description="Where the machines of all simulated hosts lie, so that those of several processes can send servers "
            "to each other; unset, `hosts` in the state directory.",
            examples=["/srv/sim"],
        ),
    ] = None
    cpus: A[int, Meta(description="CPUs of each.", ge=1)] = 64
    memory_mb: A[int, Meta(description="Memory of each.", ge=1)] = 262_144
    disk_gb: A[int, Meta(description="Disk of each.", ge=1)] = 4096
    cells: A[int, Meta(description="NUMA nodes of each.", ge=1, le=16)] = 1
    threads: A[int, Meta(description="Threads of each core.", ge=1, le=8)] = 1
    pages: A[dict[str, int], Meta(description="Huge pages of each node, by their size in KiB: `{2048 = 1024}`.")] = {}
    devices: A[
        tuple[str, ...],
        Meta(
            description="Devices of each, by resource class: `CUSTOM_PCI_10DE_1EB8`, eight functions of one as "
            "`CUSTOM_PCI_8086_154D=8`, four virtual GPUs of one as `VGPU=4`; `@1` after it: on that NUMA node."
        ),
    ] = ()
    latency_s: A[float, Meta(description="How long an act takes, on the average.", ge=0)] = 0.0
    boot_s: A[float, Meta(description="How long a guest takes to boot, on the average.", ge=0)] = 0.0
    failure_rate: A[float, Meta(description="How many acts of a thousand fail, as a fraction.", ge=0, le=1)] = 0.0


class Scheduler(Struct, frozen=True):
    """Which host a server gets."""

    rules: A[
        tuple[str, ...] | None,
        Meta(description="The rules asked, by name; unset, those that are standard.", examples=[[]]),
    ] = None
    tastes: A[
        dict[str, float], Meta(description="Weights by name (`ram`, `cpu`, `disk`, …); others keep their standard.")
    ] = {}
    attempts: A[int, Meta(description="Hosts tried for one server before it is in error.", ge=1)] = 3
    driver: A[
        Literal["filter", "chance", "caching"],
        Meta(description="`chance` takes any host that fits; `caching` is an old name of `filter`."),
    ] = "filter"
    file: A[
        Path | None,
        Meta(
            description="Rules and tastes of your own, as Python: see docs/how/a-rule.md.",
            examples=["/etc/kilonova/rules.py"],
        ),
    ] = None
    isolated_hosts: A[tuple[str, ...], Meta(description="Hosts for isolated images (rule `isolated`).")] = ()
    isolated_images: A[tuple[str, ...], Meta(description="Ids of images that only run on isolated hosts.")] = ()
    restrict_isolated_hosts: A[bool, Meta(description="Isolated hosts take no other images.")] = True
    max_io_ops_per_host: A[
        int, Meta(description="Builds and the like that a host is at, at most (rule `io_ops_few`).", ge=0)
    ] = 8
    aggregate_image_properties_namespace: A[
        str, Meta(description="Only keys of aggregates that begin so are held against images (rule `aggregate_image`).")
    ] = ""
    aggregate_image_properties_separator: A[str, Meta(description="Ends that beginning.")] = "."
    limit_tenants_to_aggregates: A[
        bool, Meta(description="A project with aggregates of its own (`filter_tenant_id…`) uses only their hosts.")
    ] = False
    aggregate_required_for_tenants: A[bool, Meta(description="And a project without any uses none.")] = False
    require_image_type: A[
        bool, Meta(description="Only hosts that can use an image of that format without changing it.")
    ] = False
    image_devices_as_traits: A[bool, Meta(description="Only hosts that have the devices an image asks for.")] = False
    isolate_aggregates: A[
        bool, Meta(description="Aggregates with `trait:X = required` take only servers that require X.")
    ] = False
    routed_networks: A[
        bool, Meta(description="Only hosts in the aggregates of the segments that a server's networks are made of.")
    ] = False
    metrics: A[
        dict[str, float], Meta(description="What hosts measure, and how it weighs (rule and taste `metrics`).")
    ] = {}
    metrics_required: A[bool, Meta(description="A host that does not measure them is left out.")] = True
    metrics_unavailable: A[float, Meta(description="Else what it weighs.")] = -10000.0
    image_properties_weights: A[
        dict[str, float], Meta(description="Weights of properties (taste `image_properties`); empty, each weighs 1.")
    ] = {}
    apart: A[
        bool,
        Meta(
            description="Conductors ask schedulers of their own (`serve scheduler`) over the bus; else each has one in it."
        ),
    ] = False
    shuffle_best: A[int, Meta(description="Chooses by lot among so many of the best hosts.", ge=1)] = 1
    max_instances_per_host: A[int, Meta(description="Servers on a host, at most; 0 is no limit.", ge=0)] = 0


class Pci(Struct, frozen=True):
    """Devices of hosts that are given to servers."""

    device_spec: A[
        tuple[dict[str, str], ...],
        Meta(
            description="Which PCI devices of a libvirt host servers may have: `vendor_id`, `product_id`, `address` (also "
            '`0000:81:*`) name them; `resource_class` and `traits` say what they are: `[{vendor_id = "10de", '
            'product_id = "1eb8"}]`. Virtual functions are given out one by one.'
        ),
    ] = ()
    aliases: A[
        dict[str, str],
        Meta(
            description="What names in `pci_passthrough:alias` mean: a resource class, then traits that the device must have, "
            'then how near it must be: `{gpu = "CUSTOM_PCI_10DE_1EB8,HW_GPU_API_VULKAN,required"}`.'
        ),
    ] = {}


class Devices(Struct, frozen=True):
    """Devices that a libvirt host makes for servers: virtual GPUs."""

    enabled_mdev_types: A[
        tuple[str, ...],
        Meta(description="Kinds of mediated devices, as the card's driver names them.", examples=[["nvidia-35"]]),
    ] = ()
    device_addresses: A[
        dict[str, tuple[str, ...]],
        Meta(
            description="Of which cards each kind is made; of those that are not named, the first kind that they know: "
            '`{nvidia-35 = ["0000:84:00.0"]}`.'
        ),
    ] = {}


class Workers(Struct, frozen=True):
    """The engine that carries runs on."""

    name: A[
        str | None,
        Meta(
            description="What a conductor or scheduler is called among its like; unset, as its machine. Two on one machine "
            "need two names.",
            examples=["controller-1-b"],
        ),
    ] = None
    threads: A[int, Meta(description="Runs that move at the same time in a process.", ge=1, le=256)] = 4
    host_threads: A[int, Meta(description="Commands a host carries out at the same time.", ge=1, le=256)] = 8
    lease_s: A[float, Meta(description="A run whose worker is silent for so long is taken over.", gt=1)] = 30.0
    sweep_s: A[float, Meta(description="How often forgotten runs are looked for.", gt=0)] = 1.0
    command_timeout_s: A[float, Meta(description="How long a host may take for one command.", gt=0)] = 600.0
    build_timeout_s: A[
        float, Meta(description="How long a server may take to be built; then it is in error.", gt=0)
    ] = 1800.0
    keep_runs_s: A[float, Meta(description="`kilonova db purge` leaves what ended within that time.", ge=0)] = 604_800.0


class Metadata(Struct, frozen=True):
    """What guests can ask about themselves, at 169.254.169.254 and on the config drive."""

    port: A[Port, Meta(description="TCP port for proxies of a network service; 0 takes one that is free.")] = 0
    url: A[
        str | None,
        Meta(
            description="Where a fleet's hosts pass on what guests ask, if we make their networks: the `metadata` role; unset, "
            "guests there have only their config drives.",
            examples=["https://cloud.example.org:8774/metadata"],
        ),
    ] = None
    shared_secret: A[
        Secret, Meta(description="Signs the id of a server on its way from a proxy; unset, a random one.")
    ] = Secret()
    cache_s: A[float, Meta(description="Documents are made anew when so old; 0 each time.", ge=0)] = 15.0
    dhcp_domain: A[str, Meta(description="Follows a server's name in its host name; empty for none.")] = "novalocal"
    vendordata_file: A[
        Path | None, Meta(description="A JSON file that every guest can read.", examples=["/etc/kilonova/vendor.json"])
    ] = None
    vendordata_targets: A[
        dict[str, str], Meta(description='Services asked for more, by name: `{name = "https://…"}`.')
    ] = {}
    vendordata_timeout_s: A[float, Meta(description="How long such a service may take.", gt=0)] = 5.0
    vendordata_failure_fatal: A[bool, Meta(description="No answer from one of them is an error.")] = False
    vendordata_ca_file: A[
        Path | None,
        Meta(
            description="Whose certificates they may have; unset, those that this machine trusts.",
            examples=["/etc/ssl/ca.pem"],
        ),
    ] = None
    vendordata_token: A[bool, Meta(description="Send them a token of our own account, so that they know who asks.")] = (
        False
    )
    config_drive_ec2_versions: A[
        tuple[str, ...], Meta(description="Versions of the EC2 tree on config drives, besides `latest`.")
    ] = ("2009-04-04",)


class Identity(Struct, frozen=True):
    """Who may come in: the identity companion, or a real Keystone."""

    url: A[
        str | None,
        Meta(description="A real identity service; unset, our own.", examples=["https://keystone.example.org/v3"]),
    ] = None
    username: A[str, Meta(description="Our own account at a real identity service.")] = "nova"
    password: A[Secret, Meta(description="Its password.")] = Secret()
    project_name: A[str, Meta(description="Its project.")] = "service"
    domain_name: A[str, Meta(description="The domain of both.")] = "Default"
    region: A[str, Meta(description="The region in the catalog.")] = "RegionOne"
    admin_password: A[
        Secret, Meta(description="Of the first user, `admin`; unset, a random one that `up` writes to clouds.yaml.")
    ] = Secret()
    token_lifetime_s: A[int, Meta(description="How long a token is good.", ge=60)] = 3600
    token_cache_s: A[
        float, Meta(description="How late a process may hear that another changed who may do what.", ge=0)
    ] = 5.0
    fernet_rotation_s: A[int, Meta(description="How often tokens get a new key.", ge=60)] = 86_400
    fernet_keys_max: A[int, Meta(description="Keys kept for tokens that are still good.", ge=3)] = 3
    lockout_failures: A[
        int, Meta(description="Wrong passwords in a row after which a user has to wait; 0 never.", ge=0)
    ] = 8
    lockout_s: A[float, Meta(description="How long he waits.", ge=0)] = 15.0
    password_hash_cost: A[
        int, Meta(description="Cost of guessing a password: scrypt's N is 2 to this power.", ge=10, le=20)
    ] = 14


class Companions(Struct, frozen=True):
    """Identity, image, network and volume of our own, when they are a process of their own (`serve companions`)."""

    url: A[
        str | None,
        Meta(
            description="Where they are for the other roles and for clients; unset, they are in the same process.",
            examples=["http://controller-1.example.org:8776"],
        ),
    ] = None
    ca_file: A[
        Path | None,
        Meta(
            description="With https: whose certificates they and other neighbours may have; unset, those that this machine "
            "trusts.",
            examples=["/etc/kilonova/ca.pem"],
        ),
    ] = None


class Image(Struct, frozen=True):
    """The image companion, or a real Glance."""

    url: A[
        str | None, Meta(description="A real image service; unset, our own.", examples=["https://glance.example.org"])
    ] = None
    directory: A[
        Path | None,
        Meta(description="Where images lie; unset, `images` in the state directory.", examples=["/srv/images"]),
    ] = None
    max_size_bytes: A[int, Meta(description="A longer upload is refused with 413.", ge=1)] = 1_099_511_627_776
    formats: A[tuple[str, ...], Meta(description="Disk formats that may be uploaded; each is looked into.")] = (
        "raw",
        "qcow2",
        "vmdk",
        "vdi",
        "vhd",
        "vhdx",
        "iso",
        "ami",
        "ari",
        "aki",
    )


class Network(Struct, frozen=True):
    """The network companion, or a real Neutron."""

    url: A[
        str | None,
        Meta(description="A real network service; unset, our own.", examples=["https://neutron.example.org"]),
    ] = None
    plane: A[
        Literal["auto", "root", "user", "slirp", "none"],
        Meta(
            description="How networks are made real: in this machine (`root`), in a user namespace of our own (`user`), "
            "by QEMU alone (`slirp`: each guest is alone and has metadata and a port for ssh), or not at all; `auto` "
            "takes the first that can be had."
        ),
    ] = "auto"
    forward: A[
        bool,
        Meta(
            description="Let guests out to what this machine reaches: switches on forwarding of IPv4 packets on the whole "
            "machine, which stays on; under `slirp` lets QEMU connect for them, to the machine's own loopback too. Unset, "
            "guests get out if the machine forwards already (in a user namespace: where slirp4netns is installed)."
        ),
    ] = False
    gateway: A[
        str | None,
        Meta(
            description="The host of a fleet that carries our own networks' routers; unset, the first that makes networks.",
            examples=["host-1"],
        ),
    ] = None
    namespace_prefix: A[str, Meta(description="Begins the names of network namespaces, bridges and taps.")] = "kn"
    public_cidr: A[str, Meta(description="Addresses that the outside can reach: floating IPs.")] = "172.24.4.0/24"
    private_cidr: A[str, Meta(description="Addresses of the first project's first network.")] = "10.0.0.0/24"
    dns_servers: A[tuple[str, ...], Meta(description="Told to guests; empty, those of this machine.")] = ()
    mtu: A[int, Meta(description="Of networks that ask for none.", ge=576, le=9216)] = 1500
    dhcp_lease_s: A[int, Meta(description="How long a guest may keep an address unasked.", ge=120)] = 86_400
    dns_domain: A[str, Meta(description="Follows the names of ports, in the API and in what DHCP tells.")] = "novalocal"
    auto_cidr: A[str, Meta(description="Addresses of networks made for projects that ask for `auto`.")] = "10.1.0.0/24"
    quota_network: A[int, Meta(description="Networks of a project, at most; -1 is no limit.", ge=-1)] = 100
    quota_subnet: A[int, Meta(description="Subnets of a project.", ge=-1)] = 100
    quota_port: A[int, Meta(description="Ports of a project.", ge=-1)] = 500
    quota_router: A[int, Meta(description="Routers of a project.", ge=-1)] = 10
    quota_floatingip: A[int, Meta(description="Floating IPs of a project.", ge=-1)] = 50
    quota_security_group: A[int, Meta(description="Security groups of a project.", ge=-1)] = 10
    quota_security_group_rule: A[int, Meta(description="Rules of all security groups of a project.", ge=-1)] = 100


class Placement(Struct, frozen=True):
    """What there is and who holds it: the Placement API."""

    url: A[
        str | None,
        Meta(
            description="What clients call it, where it is a process of its own; unset, it is beside the Compute API.",
            examples=["https://placement.example.org"],
        ),
    ] = None
    service_url: A[
        str | None,
        Meta(
            description="A real Placement service that other services use, too: it is told of hosts and claims, and asked "
            "where there is room; unset, our own.",
            examples=["https://placement.example.org"],
        ),
    ] = None
    most_candidates: A[int, Meta(description="Candidates that a real Placement service is asked for.", ge=1)] = 1000
    randomize_candidates: A[
        bool, Meta(description="Where more candidates are found than were asked for, any of them and not the first.")
    ] = False
    candidates_max: A[
        int, Meta(description="Candidates looked for at most, whatever was asked; -1 is no limit.", ge=-1)
    ] = 100_000
    candidates_order: A[
        Literal["depth-first", "breadth-first"],
        Meta(description="All candidates of a tree before those of the next, or one of each tree in turn."),
    ] = "depth-first"
    unknown_project_id: A[str, Meta(description="Whose allocations are that were written below 1.8.")] = (
        "00000000-0000-0000-0000-000000000000"
    )
    unknown_user_id: A[str, Meta(description="The same for the user.")] = "00000000-0000-0000-0000-000000000000"


class Volume(Struct, frozen=True):
    """The block-storage companion, or a real Cinder."""

    url: A[
        str | None,
        Meta(description="A real block-storage service; unset, our own.", examples=["https://cinder.example.org/v3"]),
    ] = None
    cross_zone_attach: A[bool, Meta(description="Volumes may be of another availability zone than their server.")] = (
        True
    )
    directory: A[
        Path | None,
        Meta(description="Where volumes lie; unset, `volumes` in the state directory.", examples=["/srv/volumes"]),
    ] = None
    availability_zone: A[str, Meta(description="The one zone of all volumes.", min_length=1, max_length=255)] = "nova"
    service_id: A[str, Meta(description="The id by which volumes name the service that keeps them.")] = (
        "5a2f6f0e-6b1f-4f34-9d4b-0c6d1f7c2a11"
    )
    threads: A[int, Meta(description="How many copies of volumes and images are made at once.", ge=1)] = 2
    quota_volumes: A[int, Meta(description="Volumes of a project, at most; -1 is no limit.", ge=-1)] = 10
    quota_gigabytes: A[int, Meta(description="Gibibytes of all volumes and snapshots of a project.", ge=-1)] = 1000
    quota_snapshots: A[int, Meta(description="Snapshots of a project.", ge=-1)] = 10
    quota_backups: A[int, Meta(description="Backups of a project.", ge=-1)] = 10
    quota_backup_gigabytes: A[int, Meta(description="Gibibytes of all backups of a project.", ge=-1)] = 1000
    quota_per_volume_gigabytes: A[int, Meta(description="Gibibytes of one volume.", ge=-1)] = -1


class Share(Struct, frozen=True):
    """The companion for shared file systems, or a real Manila."""

    url: A[
        str | None,
        Meta(
            description="A real shared file systems service; unset, our own.",
            examples=["https://manila.example.org/v2"],
        ),
    ] = None
    directory: A[
        Path | None,
        Meta(description="Where shares lie; unset, `shares` in the state directory.", examples=["/srv/shares"]),
    ] = None
    ceph_user: A[
        str,
        Meta(description="As whom hosts reach shares of CephFS.", min_length=1, max_length=64, pattern=r"^[\w.-]+$"),
    ] = "kilonova"
    quota_shares: A[int, Meta(description="Shares of a project, at most; -1 is no limit.", ge=-1)] = 50
    quota_gigabytes: A[int, Meta(description="Gibibytes of all shares of a project.", ge=-1)] = 1000


class Console(Struct, frozen=True):
    """Screens and serial lines of servers, for browsers and other clients that speak websocket."""

    port: A[
        Port, Meta(description="TCP port of the proxy, on the API's address; 0, or where it is taken, a free one.")
    ] = 6080
    public_url: A[
        str | None,
        Meta(
            description="What clients call the proxy, when it is not on the API's address.",
            examples=["https://consoles.example.org"],
        ),
    ] = None
    types: A[
        tuple[Literal["novnc", "spice-html5", "spice-direct", "serial"], ...],
        Meta(description="Kinds that users may have, as far as their hosts have them."),
    ] = ("novnc", "spice-html5", "spice-direct", "serial")
    token_lifetime_s: A[float, Meta(description="How long the address of a console can be opened.", gt=0)] = 600.0
    connections_max: A[int, Meta(description="Consoles open at the same time in a process.", ge=1)] = 1000
    allowed_origins: A[
        tuple[str, ...],
        Meta(description="Names of other hosts whose pages may open consoles.", examples=[["dashboard.example.org"]]),
    ] = ()
    viewer: A[Path, Meta(description="Where noVNC's files lie, for who opens a screen in a browser.")] = Path(
        "/usr/share/novnc"
    )
    vnc_base_url: A[
        str | None,
        Meta(
            description="What addresses of VNC consoles begin with: a page of noVNC; unset, at our own proxy.",
            examples=["https://cloud.example.org/novnc/vnc_auto.html"],
        ),
    ] = None
    spice_base_url: A[
        str | None,
        Meta(description="The same of SPICE consoles.", examples=["https://cloud.example.org/spice/spice_auto.html"]),
    ] = None
    serial_base_url: A[
        str | None,
        Meta(description="The same of serial consoles.", examples=["wss://cloud.example.org/serial/"]),
    ] = None


class Notifications(Struct, frozen=True):
    """What other programs are told of what happens here, over a broker, as oslo.messaging's listeners read it."""

    url: A[
        Secret,
        Meta(
            description="The broker where they are read, as in [bus] url; unset, that one. Its certificate is held to [bus] ca_file.",
            examples=["amqp://kilonova:password@mq1.example.org//"],
        ),
    ] = Secret()
    exchange: A[str, Meta(description="The topic exchange that listeners read. They make it, and their queues.")] = (
        "nova"
    )
    format: A[
        Literal["none", "versioned", "unversioned", "both"],
        Meta(description="In which form; `unversioned` is the older one, of servers only."),
    ] = "none"
    versioned_topics: A[tuple[str, ...], Meta(description="Addresses of versioned notifications.")] = (
        "versioned_notifications",
    )
    unversioned_topics: A[tuple[str, ...], Meta(description="Addresses of the older ones.")] = ("notifications",)
    state_changes: A[
        Literal["none", "vm_state", "vm_and_task_state"],
        Meta(description="Of which changes of a server's state `instance.update` tells."),
    ] = "none"
    block_devices: A[bool, Meta(description="Payloads of servers name their volumes.")] = False
    shares: A[bool, Meta(description="Payloads of servers name their shared file systems.")] = False
    keep_s: A[float, Meta(description="One that nobody takes is kept so long.", gt=0)] = 86_400.0


class Log(Struct, frozen=True):
    """What is said while it works."""

    level: A[Literal["debug", "info", "warning", "error"], Meta(description="From which weight on.")] = "info"
    format: A[Literal["plain", "json"], Meta(description="For people, or one JSON object a line.")] = "plain"
    file: A[Path | None, Meta(description="Unset, standard error.", examples=["/var/log/kilonova/kilonova.log"])] = None
    access: A[bool, Meta(description="A line for each request.")] = False
    levels: A[dict[str, str], Meta(description='Other levels for single loggers: `{keystoneauth = "debug"}`.')] = {}


class Tls(Struct, frozen=True):
    """Certificates of everything that listens for HTTP: APIs, metadata for proxies, health, consoles. Without: plain HTTP."""

    cert_file: A[
        Path | None,
        Meta(
            description="PEM: the certificate for what clients call this process, and what leads to its authority.",
            examples=["/etc/kilonova/cert.pem"],
        ),
    ] = None
    key_file: A[
        Path | None, Meta(description="PEM: its key, without a password.", examples=["/etc/kilonova/key.pem"])
    ] = None
    ca_file: A[
        Path | None,
        Meta(
            description="What clients must trust, as `up` tells it to them in clouds.yaml; unset, what their machine trusts.",
            examples=["/etc/kilonova/ca.pem"],
        ),
    ] = None


class Policy(Struct, frozen=True):
    """Who may do what."""

    file: A[
        Path | None,
        Meta(description="Rules that differ from ours, as `policy.yaml`.", examples=["/etc/kilonova/policy.yaml"]),
    ] = None


class Evacuation(Struct, frozen=True):
    """Servers of hosts that are gone, moved without being asked."""

    after_s: A[
        float,
        Meta(
            description="A host that was silent for so long loses its servers to others; 0: never by itself. Set it only where "
            "something switches silent hosts off: one that merely cannot be heard goes on running its guests.",
            ge=0,
        ),
    ] = 0.0
    share_max: A[
        float,
        Meta(
            description="When more hosts than this share are silent at once, nothing is moved (one always is).",
            ge=0,
            le=1,
        ),
    ] = 0.2


class Config(Struct, frozen=True):
    """The whole tree."""

    api: Api = Api()
    database: Database = Database()
    bus: Bus = Bus()
    state: State = State()
    quota: Quota = Quota()
    unified_limits: UnifiedLimits = UnifiedLimits()
    compute: Compute = Compute()
    evacuation: Evacuation = Evacuation()
    libvirt: Libvirt = Libvirt()
    sim: Sim = Sim()
    scheduler: Scheduler = Scheduler()
    pci: Pci = Pci()
    devices: Devices = Devices()
    workers: Workers = Workers()
    metadata: Metadata = Metadata()
    companions: Companions = Companions()
    identity: Identity = Identity()
    image: Image = Image()
    network: Network = Network()
    placement: Placement = Placement()
    volume: Volume = Volume()
    share: Share = Share()
    console: Console = Console()
    notifications: Notifications = Notifications()
    log: Log = Log()
    tls: Tls = Tls()
    policy: Policy = Policy()
