//! The memory of the daemon's control group, which a unit's MemoryMax= and a container's limit apply to. It includes
//! the kernel's memory for the daemon's sockets, which the resident memory of the process does not.

use std::fs;
use std::path::Path;

/// The memory that a control group uses, and its limit, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CgroupMemory {
    pub(super) usage: u64,
    /// `None` means that there is no limit.
    pub(super) limit: Option<u64>,
}

/// Version 1 represents no limit as a number near 2⁶³; any limit from here on counts as none.
const V1_UNLIMITED_MIN: u64 = 1 << 62;

impl CgroupMemory {
    /// The memory of this process's control group; `None` if it can't be read, or if the group is the root of all
    /// groups, which has no such files.
    pub(super) fn read() -> Option<Self> {
        Self::read_below(Path::new("/"))
    }

    fn read_below(root: &Path) -> Option<Self> {
        // cgroups(7): HIERARCHY:CONTROLLERS:PATH. If both versions are mounted, version 1 controls the memory.
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let find = |matches: fn(&str) -> bool| {
            let mut groups = groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(":/"));
            groups.find(|(controllers, _)| matches(controllers)).map(|(_, path)| path)
        };
        let v1 = find(|controllers| controllers.split(',').any(|controller| controller == "memory"));
        let v2 = find(str::is_empty);
        let (mount, path, usage, limit) = match (v1, v2) {
            (Some(path), _) => ("memory", path, "memory.usage_in_bytes", "memory.limit_in_bytes"),
            (None, path) => ("", path?, "memory.current", "memory.max"),
        };
        let mount = root.join("sys/fs/cgroup").join(mount);
        // A container may see only its own group mounted, under a path that is the host's.
        [mount.join(path), mount].iter().find_map(|group| {
            let read = |name| fs::read_to_string(group.join(name)).ok();
            let limit = read(limit)?.trim_end().parse().ok().filter(|limit| *limit < V1_UNLIMITED_MIN);
            Some(Self { usage: read(usage)?.trim_end().parse().ok()?, limit })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory in `files`, given by paths and contents.
    fn read(files: &[(&str, &str)]) -> Option<CgroupMemory> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        CgroupMemory::read_below(root.path())
    }

    #[test]
    fn unit_and_container_groups_are_found() {
        let (unit, group) =
            ("0::/system.slice/key-service.service\n", "sys/fs/cgroup/system.slice/key-service.service");
        let files = [
            ("proc/self/cgroup", unit),
            (&format!("{group}/memory.current"), "4194304\n"),
            (&format!("{group}/memory.max"), "536870912\n"),
        ];
        assert_eq!(read(&files), Some(CgroupMemory { usage: 4 << 20, limit: Some(512 << 20) }));
        let container = [
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.current", "1\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ];
        assert_eq!(read(&container), Some(CgroupMemory { usage: 1, limit: None }));
        // Version 1: the path is the host's, the mount is the container's own.
        let old = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/pod/1\n4:memory:/pod/1\n1:name=systemd:/\n0::/other\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "7\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n"),
        ];
        assert_eq!(read(&old), Some(CgroupMemory { usage: 7, limit: Some(256 << 20) }));
        let unlimited =
            [old[0], old[1], ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")];
        assert_eq!(read(&unlimited), Some(CgroupMemory { usage: 7, limit: None }));
    }

    #[test]
    fn the_root_group_and_no_group_have_no_memory() {
        assert_eq!(read(&[("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/cgroup.procs", "1\n")]), None);
        assert_eq!(read(&[("proc/self/cgroup", "0::/a\n")]), None);
        assert_eq!(read(&[("proc/self/stat", "")]), None);
    }
}
