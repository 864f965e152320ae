//! The memory of the daemon's control group, which a unit's MemoryMax= and a container's limit are about: the kernel's
//! memory for its sockets is in it, and not in the resident memory of the process.

use std::fs;
use std::path::Path;

/// What a control group uses and may use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) usage: u64,
    /// `None` is no limit.
    pub(crate) limit: Option<u64>,
}

/// Version 1 has no word for no limit, but this number or one a little below it.
const V1_UNLIMITED: u64 = 1 << 62;

impl Memory {
    /// That of the group that this process is in; `None` where it can't be read, or is the root of all groups.
    pub(crate) fn read() -> Option<Self> {
        Self::read_below(Path::new("/"))
    }

    fn read_below(root: &Path) -> Option<Self> {
        // cgroups(7): HIERARCHY:CONTROLLERS:PATH. Where both versions are mounted, memory is of version 1.
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let find = |is: fn(&str) -> bool| {
            let mut groups = groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(":/"));
            groups.find(|(controllers, _)| is(controllers)).map(|(_, path)| path)
        };
        let v1 = find(|controllers| controllers.split(',').any(|controller| controller == "memory"));
        let v2 = find(str::is_empty);
        let (mount, path, usage, limit) = match (v1, v2) {
            (Some(path), _) => ("memory", path, "memory.usage_in_bytes", "memory.limit_in_bytes"),
            (None, path) => ("", path?, "memory.current", "memory.max"),
        };
        let mount = root.join("sys/fs/cgroup").join(mount);
        // A container may have its own group mounted, and its path on the host.
        [mount.join(path), mount].iter().find_map(|group| {
            let read = |name| fs::read_to_string(group.join(name)).ok();
            let limit = read(limit)?.trim_end().parse().ok().filter(|limit| *limit < V1_UNLIMITED);
            Some(Self { usage: read(usage)?.trim_end().parse().ok()?, limit })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of `files` and their contents.
    fn read(files: &[(&str, &str)]) -> Option<Memory> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Memory::read_below(root.path())
    }

    #[test]
    fn the_group_of_a_unit_and_that_of_a_container_are_found() {
        let (unit, group) =
            ("0::/system.slice/key-service.service\n", "sys/fs/cgroup/system.slice/key-service.service");
        let files = [
            ("proc/self/cgroup", unit),
            (&format!("{group}/memory.current"), "4194304\n"),
            (&format!("{group}/memory.max"), "536870912\n"),
        ];
        assert_eq!(read(&files), Some(Memory { usage: 4 << 20, limit: Some(512 << 20) }));
        let container = [
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.current", "1\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ];
        assert_eq!(read(&container), Some(Memory { usage: 1, limit: None }));
        // Version 1: the path is the host's, the mount the container's own.
        let old = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/pod/1\n4:memory:/pod/1\n1:name=systemd:/\n0::/other\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "7\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n"),
        ];
        assert_eq!(read(&old), Some(Memory { usage: 7, limit: Some(256 << 20) }));
        let unlimited =
            [old[0], old[1], ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")];
        assert_eq!(read(&unlimited), Some(Memory { usage: 7, limit: None }));
    }

    #[test]
    fn the_root_of_all_groups_and_no_group_have_no_memory() {
        assert_eq!(read(&[("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/cgroup.procs", "1\n")]), None);
        assert_eq!(read(&[("proc/self/cgroup", "0::/a\n")]), None);
        assert_eq!(read(&[("proc/self/stat", "")]), None);
    }
}
