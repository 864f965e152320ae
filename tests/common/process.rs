//! Processes that a test starts. Each is killed at the end of the test at the latest. None inherits a standard stream of
//! the test, because a process that outlived the test would keep the pipe of `cargo test | grep` open.
//!
//! Only this module creates commands, and only of programs that a minimal Debian with Rust has. tests/processes.rs checks
//! both. A test that needs another program belongs in tests/e2e.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use super::until;

/// The path of the daemon's binary: $KEY_SERVICE_BIN (for example, a packaged binary), or else the one that Cargo built
/// with these tests.
pub fn binary() -> String {
    std::env::var("KEY_SERVICE_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_key-service").into())
}

/// A command of the daemon's binary.
pub fn daemon() -> Command {
    quiet(binary())
}

/// A script for `sh`. Its last command must be an `exec`, so that the test kills that command and not only the shell.
/// Arguments that are added to the command are the script's `$@`.
pub fn shell(script: &str) -> Command {
    let mut command = quiet("sh");
    command.args(["-c", script, "sh"]);
    command
}

/// The compiler that these tests were built with.
pub fn rustc() -> Command {
    quiet(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// A command whose standard streams are /dev/null.
fn quiet(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A running process. Dropping it kills the process and waits for it to exit.
pub struct Process(Child);

impl Process {
    pub fn spawn(mut command: Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends the signal with this name, without `SIG`.
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

    /// Waits for the process to exit, and returns its exit status.
    pub fn wait(&mut self) -> ExitStatus {
        until("the process to exit", || self.try_wait())
    }

    /// The exit status, or `None` while the process runs.
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

/// Runs a command until it exits. A daemon that starts although it must not is killed after the timeout.
pub fn run_to_end(mut command: Command) -> Output {
    command.stdout(Stdio::piped());
    run_to_end_keeping_stdout(command)
}

/// Like [`run_to_end`], for a command whose standard output is a socket that it passes on.
pub fn run_to_end_keeping_stdout(mut command: Command) -> Output {
    // `just slow` delays the writes of the daemon, not of its clients such as `key-service health`.
    command.stderr(Stdio::piped()).env_remove("SLOW");
    let mut process = Process::spawn(command);
    let (stdout, stderr) = (process.0.stdout.take(), process.0.stderr.take());
    // No other process holds the write ends, so both readers finish when the process exits.
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
