//! No test leaves a process behind, even if it panics. No test needs a program that a minimal Debian with Rust lacks.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;

use common::process::{Process, shell};
use common::{Daemon, TempDirectory, until};
use rustix::process::{Pid, test_kill_process};

/// Whether the process exists: running, or not yet waited for.
fn exists(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap()).is_ok()
}

/// The process id that a script writes to the file.
fn written_pid(file: &Path) -> u32 {
    until("the process id", || fs::read_to_string(file).ok()?.strip_suffix('\n')?.parse().ok())
}

const NEVER_ENDS: &str = "echo $$ >\"$1\" && exec sleep 3600";

#[test]
fn a_panicking_test_leaves_no_process() {
    let directory = TempDirectory::new();
    let file = directory.file("pid");
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let mut command = shell(NEVER_ENDS);
        command.arg(&file);
        let _process = Process::spawn(command);
        assert!(!exists(written_pid(&file)), "this assertion fails");
    }));
    assert!(ended.is_err() && !exists(written_pid(&file)));

    let mut pid = 0;
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let daemon = Daemon::start(&[]);
        pid = daemon.pid();
        assert_eq!(daemon.get("/key/32").status, 500, "this assertion fails");
    }));
    assert!(ended.is_err() && pid != 0 && !exists(pid));
}

#[test]
fn a_panic_before_ready_leaves_no_process() {
    let directory = TempDirectory::new();
    let (file, notify) = (directory.file("pid"), directory.file("notify"));
    let notifying = thread::spawn({
        let file = file.clone();
        move || {
            let pid = written_pid(&file);
            UnixDatagram::unbound().unwrap().send_to(b"STATUS=not READY", notify).unwrap();
            pid
        }
    });
    let mut command = shell(NEVER_ENDS);
    command.arg(&file);
    assert!(catch_unwind(AssertUnwindSafe(|| Daemon::run(directory, command))).is_err());
    assert!(!exists(notifying.join().unwrap()));
}

#[test]
fn no_process_inherits_a_standard_stream_of_the_test() {
    let daemon = Daemon::start(&[]);
    let stream = |number: u32| fs::read_link(format!("/proc/{}/fd/{number}", daemon.pid())).unwrap();
    let null = PathBuf::from("/dev/null");
    assert_eq!([stream(0), stream(1)], [null.clone(), null]);
    assert_eq!(stream(2), Path::new("/memfd:stderr (deleted)"));
}

/// Every Rust file below a directory of the repository.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    directories.iter().flat_map(|path| sources(path)).chain(files).collect()
}

/// A line that starts a process without [`Process`].
fn unguarded(text: &str) -> Option<&str> {
    let starts = [concat!("Command::", "new("), concat!(".sp", "awn()"), concat!(".out", "put()")];
    text.lines().find(|line| starts.iter().any(|start| line.contains(start)))
}

#[test]
fn every_process_is_started_by_the_guard() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files: Vec<_> =
        ["src", "tests", "benches"].iter().flat_map(|name| sources(&root.join(name))).collect();
    let guard = root.join("tests/common/process.rs");
    assert!(files.contains(&guard) && files.len() > 50, "{files:?}");
    // The subcommand is not a test, and runs systemctl(1).
    let reload = root.join("src/systemd/reload.rs");
    for file in files.iter().filter(|file| **file != guard) {
        let mut found = fs::read_to_string(file).unwrap();
        if *file == reload {
            let lines: Vec<_> = found.lines().filter(|line| !line.contains("\"systemctl\"")).collect();
            assert_eq!(lines.len() + 1, found.lines().count(), "systemctl is started in one place");
            found = lines.join("\n");
        }
        assert_eq!(unguarded(&found), None, "{}: start it by tests/common/process.rs", file.display());
    }
    let guard = fs::read_to_string(guard).unwrap();
    assert!(unguarded(&guard).is_some(), "the search finds process starts");
    // sh is dash on Debian, an essential package; rustc built these tests.
    let programs: Vec<_> =
        guard.lines().filter_map(|line| line.split_once("quiet(")).map(|(_, rest)| rest).collect();
    assert_eq!(programs.len(), 4, "the daemon, sh, rustc, and the function itself: {programs:?}");
}
