"""The cache's own configuration: tiers and their sizes, eviction, transfers, trace."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

from pydantic import SecretStr, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from flexkv.common.config_keys import (
    BLOCKS_MAX,
    HIDDEN,
    ConfigModel,
    RetiredKeyWarning,
    check_no_rivals,
    key,
)
from flexkv.common.config_model import ModelConfig
from flexkv.common.config_sizes import GB, MB, SIZE_PAIRS, given_size, sizes_of
from flexkv.common.config_values import (
    Addresses,
    CustomConfig,
    EvictionPolicy,
    Layout,
    Paths,
)
from flexkv.common.errors import ConfigError
from flexkv.common.sharing import check_local_ip, check_secrets
from flexkv.common.space import CacheSizes, GivenSize


def _thread_blocks(direction: str, old: str) -> Any:
    """Return the key for one direction of the copies by kernel."""
    what = f"Thread blocks of the kernel that copies {direction}; unset = by measurement."
    return key(None, what, ge=1, le=65535, old=(old,))


_FILE_KEYS = {
    "remote_cache_size_mode", "remote_file_size", "remote_file_num", "remote_file_prefix",
}  # fmt: skip


class CacheConfig(ConfigModel):
    """The cache's configuration keys. Every key has a default."""

    tokens_per_block: int = key(
        16, "Tokens per block; equals the engine's page size.", unit="tokens", ge=1, le=65536
    )

    # host tier
    enable_cpu: bool = key(
        True, "Keep blocks in host memory.", part="running without the host tier", built=(True,)
    )
    num_cpu_blocks: int | None = key(
        None, "Size of the host tier, in place of cpu_cache_gb.", unit="blocks"
    )
    cpu_cache_gb: float = key(16.0, "Size of the host tier.", unit="GB")
    use_hugepage_cpu_buffer: bool = key(
        True, "Use huge pages for the host tier, or ordinary pages if there are none."
    )
    hugepage_size_bytes: int = key(
        2 * MB, "Size of a reserved huge page: a power of two.", unit="bytes", ge=4096, le=16 * GB
    )

    # SSD tier
    num_ssd_blocks: int | None = key(
        None, "Size of the SSD tier, in place of ssd_cache_gb.", unit="blocks"
    )
    ssd_cache_gb: float = key(0.0, "Size of the SSD tier; 0 = off.", unit="GB")
    enable_ssd: bool = key(
        None, "Keep blocks on SSD.", shown_default="true if the SSD tier has a size"
    )
    ssd_cache_dir: Paths = key(
        (),
        "Directory of the SSD tier; several (`;`-separated or a list) are striped. Only the user "
        "who runs the engine, or root, may own it and write to it; a missing one is created. `~` "
        "and `$VARIABLE` are expanded, and `file:///dir` is accepted. If one cannot be used, its "
        "part of the tier is lost; the log, `statistics()` and `flexkv doctor` name it.",
    )
    strict: bool = key(
        False,
        "Whether the engine refuses to start when the SSD tier, or a directory of it, cannot be "
        "used; otherwise it starts without it.",
    )
    ssd_preallocate: bool = key(
        True, "Allocate all space of the SSD tier at the start; otherwise as blocks are written."
    )
    ssd_warm_restart: bool = key(
        True, "Keep a journal, so that the SSD tier is warm after a restart or a crash."
    )
    ssd_on_mismatch: Literal["empty", "refuse"] = key(
        "empty",
        "What to do with a directory whose blocks are of another model, layout, secret or version.",
    )
    ssd_scrub_mb_per_s: float = key(
        0.0,
        "How fast to reread the blocks on SSD in idle time, to find corrupt ones; 0 = off.",
        unit="MB/s",
    )
    io_deadline_s: float = key(
        10.0,
        "How long I/O of a lower tier, or a copy to or from a device, may take; after that, "
        "no request waits for it, and the tier or device is not used until it works again.",
        unit="s",
        gt=0,
    )
    max_file_size_gb: float = key(
        -1.0, "Largest size of one SSD file; -1 = no limit.", unit="GB", ge=-1
    )
    max_blocks_per_file: int | None = key(
        None,
        "Largest size of one SSD file, in blocks.",
        unit="blocks",
        ge=-1,
        retired="use max_file_size_gb; the blocks are converted",
    )
    iouring_entries: int = key(
        512,
        "Queue depth of io_uring; 0 = use threads instead of io_uring.",
        ge=0,
        le=32768,
        old=("ssd_cache_iouring_entries",),
    )
    iouring_flags: int = key(
        0,
        "Set-up flags of io_uring, as the kernel numbers them.",
        ge=0,
        le=2**32 - 1,
        old=("ssd_cache_iouring_flags",),
    )
    enable_gds: bool = key(
        False,
        "Move blocks directly between SSD and GPU. Not built: they go through host memory, where "
        "they are checked, and a warning says so.",
        old=("use_gds",),
    )

    # remote tier
    enable_remote: bool = key(False, "Keep blocks in remote storage, which other engines share.")
    num_remote_blocks: int | None = key(
        None, "Size of the remote tier; unset = no limit.", unit="blocks", ge=1
    )
    remote_cache_path: Addresses = key(
        (),
        "Where the remote tier is: `s3://bucket/prefix`, `gs://…`, `az://…`, `memory://` (for "
        "tests), or a directory that the engines share, `file:///dir`.",
    )
    remote_config_custom: CustomConfig = key(
        {},
        "Options of the remote store's client: endpoint, bucket, region, credentials, … Without "
        "credentials here they are looked for in the environment and in the roles of the machine.",
        secret=True,
        shown_default="{}",
    )
    remote_write: Literal["through", "reused", "off"] = key(
        "through",
        "What is written to the remote tier: everything that reaches host memory, only what a "
        "load has found there, or nothing.",
    )
    remote_read_window_mb: float = key(
        256.0, "Most bytes being read from the remote tier at once.", unit="MB", gt=0
    )
    remote_write_window_mb: float = key(
        64.0, "Most bytes being written to the remote tier at once.", unit="MB", gt=0
    )
    remote_write_mb_per_s: float | None = key(
        None,
        "How fast to write to the remote tier; what waits for its turn may be evicted meanwhile. "
        "Unset = as fast as it can.",
        unit="MB/s",
        gt=0,
    )
    remote_ttl_s: float | None = key(
        None,
        "How long a span stays in the remote tier after it was last read or written; unset = as "
        "long as there is room. It should be longer than a few rounds of the listing.",
        unit="s",
        ge=1,
    )
    remote_delete_per_s: float = key(
        200.0,
        "Most spans that this engine deletes from the remote tier, when it is the one that does.",
        unit="1/s",
        gt=0,
        le=10_000,
    )
    remote_list_per_s: float = key(
        4.0,
        "Requests that list the remote tier, after the first listing; 0 = list only at the start.",
        unit="1/s",
        ge=0,
        le=1000,
    )
    remote_cache_size_mode: Literal["file_size", "block_num"] = key(
        "file_size", "Accepted but ignored: num_remote_blocks is the size of the remote tier."
    )
    remote_file_size: int | None = key(
        None,
        "Accepted but ignored: the remote tier has an object for every few blocks.",
        unit="bytes",
        ge=1,
        le=1 << 50,
    )
    remote_file_num: int | None = key(
        None,
        "Accepted but ignored: the remote tier has an object for every few blocks.",
        ge=1,
        le=BLOCKS_MAX,
    )
    remote_file_prefix: str | None = key(
        None, "Accepted but ignored: objects are named below remote_cache_path."
    )
    use_mooncake_store_backend: bool = key(
        False, "Keep blocks in a Mooncake Store; the remote tier is enabled then."
    )
    mooncake_store_config_path: str | None = key(
        None,
        "Configuration file of Mooncake Store, as Mooncake has it: local_hostname, "
        "metadata_server, master_server_address, protocol, device_name, global_segment_size, …",
    )

    # eviction
    evict_ratio: float = key(
        0.05, "Least share of a tier that one eviction frees; 0 = only what is needed.", ge=0, le=1
    )
    evict_start_threshold: float = key(
        1.0,
        "Used share of a tier from which blocks are evicted ahead of need; 1 = never.",
        gt=0,
        le=1,
    )
    eviction_policy: EvictionPolicy = key("lru", "lru, fifo, mru, filo, lfu, slru or lhd.")
    hit_reward_seconds: float = key(
        0.0, "How much younger each hit makes a block, under lru.", unit="s"
    )
    slru_protected_threshold: int = key(
        2, "Hits after which slru protects a block.", unit="hits", ge=1, le=2**31
    )

    # transfers
    use_ce_transfer_h2d: bool | None = key(
        None, "Copy host to GPU by copy engine (true) or kernel (false); unset = by measurement."
    )
    use_ce_transfer_d2h: bool | None = key(
        None, "Copy GPU to host by copy engine (true) or kernel (false); unset = by measurement."
    )
    transfer_num_cta_h2d: int | None = _thread_blocks("host to GPU", "transfer_sms_h2d")
    transfer_num_cta_d2h: int | None = _thread_blocks("GPU to host", "transfer_sms_d2h")
    chunk_mb: float = key(16.0, "Size of one chunk of a pipelined request.", unit="MB", gt=0)
    copy_threads: int = key(
        0,
        "Threads that copy between device and host memory; 0 = one per core, at most 4.",
        ge=0,
        le=256,
    )
    disk_read_window_mb: float = key(
        32.0, "Most bytes being read from SSD at once.", unit="MB", gt=0
    )
    disk_write_window_mb: float = key(
        32.0, "Most bytes being written to SSD at once.", unit="MB", gt=0
    )
    device_window_mb: float = key(
        128.0,
        "Most bytes being copied to or from the device at once; four times as many for a GPU.",
        unit="MB",
        gt=0,
    )
    write_behind_max_gb: float = key(
        -1.0,
        "Most bytes that puts may queue for the SSD; -1 = half of the host tier. More blocks wait "
        "in host memory and are written later.",
        unit="GB",
        ge=-1,
    )
    write_behind_wait_s: float = key(
        2.0,
        "How long a burst of puts may wait in total while host memory is full of blocks that are "
        "not on SSD yet; after that, blocks may be evicted before they are written.",
        unit="s",
    )
    shutdown_flush_s: float = key(
        5.0,
        "How long closing may take to write blocks that are not on SSD yet; 0 = write none.",
        unit="s",
    )
    requests_max: int = key(
        1024,
        "Most requests under way at once; later ones wait to be admitted, and the instances of a "
        "server take turns.",
        unit="requests",
        ge=1,
        le=1 << 20,
    )

    # layouts
    cpu_layout: Layout = key("BLOCKFIRST", "Layout of the host tier.", old=("cpu_kv_layout_type",))
    ssd_layout: Layout = key("BLOCKFIRST", "Layout of the SSD tier.", old=("ssd_kv_layout_type",))
    remote_layout: Layout = key(
        "BLOCKFIRST", "Layout of the remote tier.", old=("remote_kv_layout_type",)
    )
    gpu_kv_layout_type: str | None = key(
        None,
        "Layout of the device's KV caches.",
        retired="it is ignored; register_kv_caches infers the layout, or takes it as an argument",
    )

    # identity, sharing between nodes
    key_secret: SecretStr = key(
        "",
        "Secret that block keys are derived with, the same in all processes that share blocks: "
        "nobody without it can guess a key, or make prompts that share one. Use 128 "
        "random bits (`openssl rand -hex 16`) where users do not trust each other.",
        secret=True,
        shown_default="empty",
    )
    index_accel: bool = key(True, "Accepted but ignored: there is only one index.")
    enable_p2p_cpu: bool = key(
        False,
        "Share host memory with other nodes: they may fetch what it holds, and this engine fetches "
        "what they hold.",
    )
    enable_p2p_ssd: bool = key(
        False,
        "Share the SSD tier, too: other nodes may fetch blocks that are only on this one's SSD.",
    )
    redis_host: str = key(
        "127.0.0.1", "Host of the Redis that holds the nodes' metadata.", min_length=1
    )
    redis_port: int = key(6379, "Port of that Redis.", ge=1, le=65535)
    redis_password: SecretStr = key("", "Its password.", secret=True, shown_default="empty")
    cluster_secret: SecretStr = key(
        "",
        "Secret that nodes prove to each other before they share anything. Unset = derived from "
        "`key_secret` and `redis_password`; one of the three must be set unless `local_ip` is an "
        "address of this machine alone.",
        secret=True,
        shown_default="empty",
    )
    local_ip: str = key("127.0.0.1", "Address at which other nodes reach this one.")
    p2p_port: int = key(
        0, "Port at which other nodes reach this one; 0 = any free port.", ge=0, le=65535
    )
    p2p_zone: str = key(
        "default",
        "Nodes of one zone share blocks with each other. A zone has at most 350 nodes: one Redis "
        "carries no more.",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
    )
    p2p_publish_ms: float = key(
        50.0,
        "How long changes may wait until other nodes are told. Longer in zones of more than 100 "
        "nodes, in proportion.",
        unit="ms",
        ge=1,
        le=60_000,
    )
    p2p_pinned_max: float = key(
        0.05, "Largest share of host memory that is kept in place for peers that read it.",
        gt=0, le=1,
    )  # fmt: skip
    p2p_read_window_mb: float = key(
        128.0, "Most bytes being read from other nodes at once.", unit="MB", gt=0
    )
    p2p_out_mb_per_s: float | None = key(
        None,
        "Most bytes sent per second to other nodes, all of them together. Unset = no limit.",
        unit="MB/s",
        gt=0,
    )
    p2p_admit: Literal["always", "second_use", "policy"] = key(
        "second_use",
        "How blocks fetched from other nodes stay in host memory: like all others, shortly unless "
        "asked for again, or if the policy finds them worth it (`lhd`: it may refuse to fetch).",
    )
    node_ttl_seconds: float = key(30.0, "Silence after which a node is gone.", unit="s", ge=1)
    mooncake_config_path: str | None = key(
        None, "Configuration file of Mooncake's TransferEngine; with it, that moves the blocks."
    )
    p2p_trusted_network: bool = key(
        False, "Whether all who reach the nodes' network may change blocks, as RDMA lets them."
    )

    # trace
    enable_trace: bool = key(False, "Write a record of every request and transfer op.")
    trace_file_path: str = key("./flexkv_trace.log", "Path of the trace file.", min_length=1)
    trace_max_file_size_mb: float = key(
        100.0, "Size at which the trace starts a new file.", unit="MB", gt=0
    )
    trace_tokens: bool = key(
        False, "Whether the trace has the prompts in clear; otherwise only their lengths and keys."
    )
    trace_max_files: int = key(5, "Trace files kept, the current one included.", ge=1, le=10_000)
    trace_flush_interval_ms: int = key(
        1000,
        "How long a record may wait before it is written to the file.",
        unit="ms",
        ge=1,
        le=86_400_000,
    )

    load_if_faster: bool = key(
        True, "Whether engines load only what was measured to load faster than it is computed."
    )
    prefetch_stop: Literal["best_effort", "complete", "timeout"] = key(
        "timeout",
        "How long a prompt of an engine waits for blocks that are fetched from a far tier: not at "
        "all once the engine would run it (`best_effort`), until the fetch ends (`complete`), or "
        "for `prefetch_timeout_ms` at most, and no longer than computing them takes (`timeout`).",
    )
    prefetch_timeout_ms: float = key(
        2000.0, "How long a prompt waits for far blocks at most, under `timeout`.", unit="ms",
        ge=0, le=3_600_000,
    )  # fmt: skip
    num_log_interval_requests: int = key(
        200, "Requests between two summary lines in the log.", unit="requests", ge=1, le=2**53
    )

    @field_validator("enable_ssd", mode="before")
    @classmethod
    def _ssd_is_sized(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        return bool(info.data.get("num_ssd_blocks") or info.data.get("ssd_cache_gb"))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        directories = self.ssd_cache_dir
        if self.enable_ssd and not directories:
            why = "an SSD tier needs at least one directory: set this key"
            raise ConfigError("ssd_cache_dir", HIDDEN, why)
        if self.has_remote:
            self._check_remote()
        if self.has_peers:
            self._check_peers()
        if len(set(directories)) != len(directories):
            raise ConfigError("ssd_cache_dir", directories, "names a directory twice")
        if self.hugepage_size_bytes.bit_count() != 1:
            raise ConfigError(
                "hugepage_size_bytes", self.hugepage_size_bytes, "must be a power of two"
            )
        for name in ("max_file_size_gb", "write_behind_max_gb"):
            if (value := getattr(self, name)) < 0 and value != -1:
                raise ConfigError(name, value, "must be -1, 0 or more")
        check_no_rivals({name: getattr(self, name) for name in self.model_fields_set}, SIZE_PAIRS)
        return self

    @property
    def has_remote(self) -> bool:
        """Return whether there is a remote tier."""
        return self.enable_remote or self.use_mooncake_store_backend

    @property
    def has_peers(self) -> bool:
        """Return whether blocks are shared with other nodes."""
        return self.enable_p2p_cpu or self.enable_p2p_ssd

    def _check_peers(self) -> None:
        if self.enable_p2p_ssd and not self.enable_ssd:
            raise ConfigError("enable_p2p_ssd", True, "there is no SSD tier: set enable_ssd")
        check_local_ip(self.local_ip)
        secrets = self.cluster_secret, self.key_secret, self.redis_password
        check_secrets(self.local_ip, *[each.get_secret_value() for each in secrets])

    def _check_remote(self) -> None:
        if self.use_mooncake_store_backend:
            if self.remote_cache_path:
                why = "a remote tier has one store: use_mooncake_store_backend is set, too"
                raise ConfigError("remote_cache_path", HIDDEN, why)
            if not self.mooncake_store_config_path:
                why = "use_mooncake_store_backend needs it: set this key"
                raise ConfigError("mooncake_store_config_path", HIDDEN, why)
        elif not self.remote_cache_path:
            why = "enable_remote needs it: set this key"
            raise ConfigError("remote_cache_path", HIDDEN, why)
        elif (count := len(self.remote_cache_path)) > 1:
            why = f"a remote tier has one address, not {count}"
            raise ConfigError("remote_cache_path", HIDDEN, why)
        for name in sorted(_FILE_KEYS & self.model_fields_set):
            why = "is ignored: the remote tier has an object for every few blocks, not files"
            warnings.warn(f"{name} {why}", RetiredKeyWarning, stacklevel=4)

    def sized(self, model: ModelConfig) -> CacheSizes:
        """Return the tiers' sizes in blocks of this model.

        Raises:
            ConfigError: a tier has room for no block or for too many, or a block is too large.
        """
        return sizes_of(self, model)

    @property
    def host_given(self) -> GivenSize:
        """Return which key sets the size of the host tier, and to what."""
        return given_size(self, *SIZE_PAIRS[0])
