//! Processes that a test starts. Each ends with the test at the latest, and none has a standard stream of the test's: a
//! process that outlived it would hold the pipe of `cargo test | grep` open.
//!
//! Only this module makes commands, and only of programs that a minimal Debian with Rust has (tests/processes.rs checks it). A
//! test that needs another program belongs to one of the suites beside these tests.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use super::until;

/// The daemon's binary: $KEY_SERVICE_BIN, such as that of a package, else the one that Cargo built with these tests.
pub fn binary() -> String {
    std::env::var("KEY_SERVICE_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_key-service").into())
}

/// A command of the daemon's binary.
pub fn daemon() -> Command {
    quiet(binary())
}

/// A script of `sh`, which runs in place of the script's last command: it has to be an `exec`. The arguments that are added
/// are the script's `$@`.
pub fn shell(script: &str) -> Command {
    let mut command = quiet("sh");
    command.args(["-c", script, "sh"]);
    command
}

/// The compiler that these tests were built with.
pub fn rustc() -> Command {
    quiet(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

fn quiet(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A running process. Dropping it kills it and waits for its end, from the moment on which it runs.
pub struct Process(Child);

impl Process {
    pub fn spawn(mut command: Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal by its name without `SIG`.
    pub fn signal(&self, name: &str) {
        let signal = match name {
            "CONT" => Signal::CONT,
            "HUP" => Signal::HUP,
            "INT" => Signal::INT,
            "KILL" => Signal::KILL,
            "STOP" => Signal::STOP,
            "TERM" => Signal::TERM,
            _ => panic!("the tests send no {name}"),
        };
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Its exit status, once it has ended.
    pub fn wait(&mut self) -> ExitStatus {
        until("the process to end", || self.try_wait())
    }

    /// `None` while it runs.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end, for a daemon that must not start. One that does is killed.
pub fn run_to_end(mut command: Command) -> Output {
    command.stdout(Stdio::piped());
    run_to_end_keeping_stdout(command)
}

/// As [`run_to_end`], for a command whose standard output is a socket to hand over.
pub fn run_to_end_keeping_stdout(mut command: Command) -> Output {
    // `just slow` is of the daemon, not of those who ask it.
    command.stderr(Stdio::piped()).env_remove("SLOW");
    let mut process = Process::spawn(command);
    let (stdout, stderr) = (process.0.stdout.take(), process.0.stderr.take());
    // Nobody else has the other ends: both readers end with the process.
    let stdout = thread::spawn(move || stdout.map_or_else(Vec::new, read_to_end));
    let stderr = thread::spawn(move || stderr.map_or_else(Vec::new, read_to_end));
    let status = process.wait();
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn read_to_end(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).unwrap();
    bytes
}
