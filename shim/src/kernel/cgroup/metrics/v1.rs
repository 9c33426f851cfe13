//! cgroup v1's counters. Documentation/admin-guide/cgroup-v1/.

use std::cell::OnceCell;
use std::fs;

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use containerd_shim_protos::protobuf::MessageField;

use crate::kernel::cgroup::Cgroup;
use crate::kernel::cgroup::files::{Blkio, Files, Rdma, partitions};

/// The counters. The metrics leave out a controller that does not have this cgroup, except for the cpu: containerd's
/// clients read the cpu's fields without a check.
pub(super) fn metrics(cgroup: &Cgroup) -> Metrics {
    // containerd reads a limit of zero as "no limit". v1's memory files never say "max": there a very large number
    // means "no limit".
    let files = |controller| {
        let directory = cgroup.directory(controller).filter(|path| path.is_dir())?;
        Some(Files {
            directory,
            unlimited: 0,
        })
    };
    let mut metrics = Metrics {
        cpu: MessageField::some(CPUStat::new()),
        ..Metrics::default()
    };
    let cpu = metrics.cpu.mut_or_insert_default();
    cpu.usage = MessageField::some(files("cpuacct").map(cpu_usage).unwrap_or_default());
    cpu.throttling = MessageField::some(files("cpu").map(throttle).unwrap_or_default());
    if let Some(files) = files("memory") {
        metrics.memory = MessageField::some(memory(files));
        metrics.memory_oom_control = MessageField::some(oom_control(files));
    }
    if let Some(files) = files("pids") {
        let (current, limit) = (files.number("pids.current"), files.number("pids.max"));
        metrics.pids = MessageField::some(PidsStat {
            current,
            limit,
            ..PidsStat::default()
        });
    }
    metrics.blkio = files("blkio").map(blkio).into();
    metrics.hugetlb = files("hugetlb").map(hugetlb).unwrap_or_default();
    metrics.rdma = files("rdma").map(rdma).into();
    metrics
}

fn cpu_usage(files: Files<'_>) -> CPUUsage {
    let stat = files.table("cpuacct.stat");
    CPUUsage {
        total: files.number("cpuacct.usage"),
        kernel: ticks_as_nanoseconds(stat.get("system")),
        user: ticks_as_nanoseconds(stat.get("user")),
        per_cpu: per_cpu(&files.text("cpuacct.usage_percpu").unwrap_or_default()),
        ..CPUUsage::default()
    }
}

fn per_cpu(text: &str) -> Vec<u64> {
    text.split_ascii_whitespace()
        .filter_map(|usage| usage.parse().ok())
        .collect()
}

/// Converts the ticks (USER_HZ) of cpuacct.stat to nanoseconds.
fn ticks_as_nanoseconds(ticks: u64) -> u64 {
    ticks.saturating_mul(1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

fn throttle(files: Files<'_>) -> Throttle {
    let stat = files.table("cpu.stat");
    Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Throttle::default()
    }
}

fn memory(files: Files<'_>) -> MemoryStat {
    let stat = files.table("memory.stat");
    let get = |key| stat.get(key);
    let entry = |prefix: &str| {
        MessageField::some(MemoryEntry {
            limit: files.number(&format!("{prefix}.limit_in_bytes")),
            usage: files.number(&format!("{prefix}.usage_in_bytes")),
            max: files.number(&format!("{prefix}.max_usage_in_bytes")),
            failcnt: files.number(&format!("{prefix}.failcnt")),
            ..MemoryEntry::default()
        })
    };
    MemoryStat {
        cache: get("cache"),
        rss: get("rss"),
        rss_huge: get("rss_huge"),
        mapped_file: get("mapped_file"),
        dirty: get("dirty"),
        writeback: get("writeback"),
        pg_pg_in: get("pgpgin"),
        pg_pg_out: get("pgpgout"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: get("hierarchical_memory_limit"),
        hierarchical_swap_limit: get("hierarchical_memsw_limit"),
        total_cache: get("total_cache"),
        total_rss: get("total_rss"),
        total_rss_huge: get("total_rss_huge"),
        total_mapped_file: get("total_mapped_file"),
        total_dirty: get("total_dirty"),
        total_writeback: get("total_writeback"),
        total_pg_pg_in: get("total_pgpgin"),
        total_pg_pg_out: get("total_pgpgout"),
        total_pg_fault: get("total_pgfault"),
        total_pg_maj_fault: get("total_pgmajfault"),
        total_inactive_anon: get("total_inactive_anon"),
        total_active_anon: get("total_active_anon"),
        total_inactive_file: get("total_inactive_file"),
        total_active_file: get("total_active_file"),
        total_unevictable: get("total_unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
        ..MemoryStat::default()
    }
}

fn oom_control(files: Files<'_>) -> MemoryOomControl {
    let control = files.table("memory.oom_control");
    MemoryOomControl {
        oom_kill_disable: control.get("oom_kill_disable"),
        under_oom: control.get("under_oom"),
        oom_kill: control.get("oom_kill"),
        ..MemoryOomControl::default()
    }
}

/// Kernels with the CFQ scheduler (before 5.0) have all of these files. CFQ may count nothing, and later kernels count
/// only the throttling layer's IO; hence the fallbacks.
fn blkio(files: Files<'_>) -> BlkIOStat {
    let names = OnceCell::new();
    let entries = |file: &str| {
        let entry = |line: &str| {
            let Blkio {
                major,
                minor,
                operation,
                value,
            } = Blkio::parse(line)?;
            let names = names.get_or_init(|| {
                partitions(&fs::read_to_string("/proc/partitions").unwrap_or_default())
            });
            let device = names.get(&(major, minor)).cloned().unwrap_or_default();
            Some(BlkIOEntry {
                op: operation,
                device,
                major,
                minor,
                value,
                ..BlkIOEntry::default()
            })
        };
        files.lines(&format!("blkio.{file}"), entry)
    };
    let first = |candidates: &[&str]| {
        candidates
            .iter()
            .map(|file| entries(file))
            .find(|found| !found.is_empty())
    };
    let bytes = [
        "io_service_bytes_recursive",
        "throttle.io_service_bytes_recursive",
        "throttle.io_service_bytes",
    ];
    let operations = [
        "io_serviced_recursive",
        "throttle.io_serviced_recursive",
        "throttle.io_serviced",
    ];
    BlkIOStat {
        io_service_bytes_recursive: first(&bytes).unwrap_or_default(),
        io_serviced_recursive: first(&operations).unwrap_or_default(),
        io_queued_recursive: entries("io_queued_recursive"),
        io_service_time_recursive: entries("io_service_time_recursive"),
        io_wait_time_recursive: entries("io_wait_time_recursive"),
        io_merged_recursive: entries("io_merged_recursive"),
        io_time_recursive: entries("time_recursive"),
        sectors_recursive: entries("sectors_recursive"),
        ..BlkIOStat::default()
    }
}

fn hugetlb(files: Files<'_>) -> Vec<HugetlbStat> {
    let stat = |pagesize: String| HugetlbStat {
        usage: files.number(&format!("hugetlb.{pagesize}.usage_in_bytes")),
        max: files.number(&format!("hugetlb.{pagesize}.max_usage_in_bytes")),
        failcnt: files.number(&format!("hugetlb.{pagesize}.failcnt")),
        pagesize,
        ..HugetlbStat::default()
    };
    files
        .huge_page_sizes(".failcnt")
        .into_iter()
        .map(stat)
        .collect()
}

fn rdma(files: Files<'_>) -> RdmaStat {
    let entry = |line: &str| {
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
    };
    RdmaStat {
        current: files.lines("rdma.current", entry),
        limit: files.lines("rdma.max", entry),
        ..RdmaStat::default()
    }
}
