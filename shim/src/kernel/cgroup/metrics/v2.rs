//! cgroup v2's counters. Documentation/admin-guide/cgroup-v2.rst.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use containerd_shim_protos::protobuf::MessageField;

use crate::kernel::cgroup::Cgroup;
use crate::kernel::cgroup::files::{Files, Rdma, device, field};

/// Fields that containerd has added to `MemoryStat` since the version of the message that this shim is built with.
const NEWER_MEMORY_FIELDS: [(u32, &str); 4] = [
    (39, "workingset_refault_anon"),
    (40, "workingset_refault_file"),
    (41, "workingset_activate_anon"),
    (42, "workingset_activate_file"),
];

/// The counters. Parts that containerd's clients read without a check are there even without their controller.
pub(super) fn metrics(cgroup: &Cgroup) -> Metrics {
    let files = Files {
        directory: cgroup.any_path(),
        unlimited: u64::MAX,
    };
    let pids = PidsStat {
        current: files.number("pids.current"),
        limit: files.number("pids.max"),
        ..PidsStat::default()
    };
    let io = IOStat {
        usage: files.lines("io.stat", io_entry),
        psi: pressure(files, "io.pressure"),
        ..IOStat::default()
    };
    let rdma = RdmaStat {
        current: files.lines("rdma.current", rdma_entry),
        limit: files.lines("rdma.max", rdma_entry),
        ..RdmaStat::default()
    };
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu(files)),
        memory: MessageField::some(memory(files)),
        rdma: MessageField::some(rdma),
        io: MessageField::some(io),
        hugetlb: hugetlb(files),
        memory_events: memory_events(files),
        ..Metrics::default()
    }
}

fn cpu(files: Files<'_>) -> CPUStat {
    let stat = files.table("cpu.stat");
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(files, "cpu.pressure"),
        ..CPUStat::default()
    }
}

fn memory(files: Files<'_>) -> MemoryStat {
    let stat = files.table("memory.stat");
    let get = |key| stat.get(key);
    let mut memory = MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault"),
        workingset_activate: get("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: pressure(files, "memory.pressure"),
        ..MemoryStat::default()
    };
    for (number, key) in NEWER_MEMORY_FIELDS {
        if stat.get(key) != 0 {
            memory
                .special_fields
                .mut_unknown_fields()
                .add_varint(number, stat.get(key));
        }
    }
    memory
}

fn memory_events(files: Files<'_>) -> MessageField<MemoryEvents> {
    let events = files.table("memory.events");
    if events.is_empty() {
        return MessageField::none();
    }
    MessageField::some(MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::default()
    })
}

/// A line of io.stat: `major:minor key=value…`. The line of a device without counters has no keys.
fn io_entry(line: &str) -> Option<IOEntry> {
    let (number, counters) = line.split_once(' ')?;
    let (major, minor) = device(number)?;
    let get = |key| field(counters, key).unwrap_or(0);
    Some(IOEntry {
        major,
        minor,
        rbytes: get("rbytes"),
        wbytes: get("wbytes"),
        rios: get("rios"),
        wios: get("wios"),
        ..IOEntry::default()
    })
}

fn rdma_entry(line: &str) -> Option<RdmaEntry> {
    let Rdma {
        device,
        handles: hca_handles,
        objects: hca_objects,
    } = Rdma::parse(line)?;
    Some(RdmaEntry {
        device,
        hca_handles,
        hca_objects,
        ..RdmaEntry::default()
    })
}

fn hugetlb(files: Files<'_>) -> Vec<HugeTlbStat> {
    let stat = |pagesize: String| HugeTlbStat {
        current: files.number(&format!("hugetlb.{pagesize}.current")),
        max: files.number(&format!("hugetlb.{pagesize}.max")),
        failcnt: files
            .table(&format!("hugetlb.{pagesize}.events"))
            .get("max"),
        pagesize,
        ..HugeTlbStat::default()
    };
    files
        .huge_page_sizes(".current")
        .into_iter()
        .map(stat)
        .collect()
}

/// Pressure stall information (Documentation/accounting/psi.rst): a line `some avg10=… avg60=… avg300=… total=…` and a
/// line `full …`. Empty if the kernel does not count pressure.
fn pressure(files: Files<'_>, name: &str) -> MessageField<PSIStats> {
    let Some(text) = files.text(name) else {
        return MessageField::none();
    };
    let line = |kind| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '));
        let data = line.map(|line| PSIData {
            avg10: field(line, "avg10").unwrap_or(0.0),
            avg60: field(line, "avg60").unwrap_or(0.0),
            avg300: field(line, "avg300").unwrap_or(0.0),
            total: field(line, "total").unwrap_or(0),
            ..PSIData::default()
        });
        MessageField::from(data)
    };
    MessageField::some(PSIStats {
        some: line("some"),
        full: line("full"),
        ..PSIStats::default()
    })
}
