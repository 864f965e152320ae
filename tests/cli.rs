//! `key-service key` and `key-service password`: the formats and limits of the HTTP service without a service, and output
//! that is complete or not there.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::formats::{FORMATS, decode_batch, decode_key};
use common::process::{run_to_end_keeping_stdout, shell};
use common::{Daemon, Process, Response, TempDirectory, binary, key_service, run_to_end, until};
use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const MIB: u64 = 1 << 20;

fn command(arguments: &str) -> Command {
    let mut command = key_service(&TempDirectory::new());
    command.args(arguments.split(' '));
    command
}

fn run(arguments: &str) -> Output {
    run_to_end(command(arguments))
}

/// Runs `key-service` with its output in `stdout`.
fn run_into(arguments: &str, stdout: impl Into<Stdio>) -> Output {
    let mut command = command(arguments);
    command.stdout(stdout);
    run_to_end_keeping_stdout(command)
}

/// The output of a command that succeeds, as a response for the decoders.
fn printed(arguments: &str) -> Response {
    let output = run(arguments);
    assert_eq!((output.status.code(), error(&output)), (Some(0), ""), "{arguments}");
    Response { status: 200, headers: Vec::new(), body: output.stdout }
}

fn error(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

/// Checks that a command has failed with this error, in one line.
fn assert_failed(output: &Output, expected: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = error(output);
    assert!(error.starts_with("key-service: ") && error.lines().count() == 1, "{error}");
    assert!(error.contains(expected), "{error}");
}

#[test]
fn keys_have_the_formats_of_http() {
    let daemon = Daemon::start(&[("MAX_SIZE", "100000")]);
    for format in FORMATS {
        for length in [1, 32, 1000, 100_000] {
            let key = printed(&format!("key {length} --format {format} --max-size 100000"));
            assert_eq!(decode_key(format, &key).len(), length, "{format}");
            let response = daemon.get(&format!("/key/{length}?format={format}"));
            assert_eq!(key.body.len(), response.body.len(), "{format}");
        }
    }
    for format in &FORMATS[1..] {
        for (length, count) in [(32, 1), (32, 3), (64, 1024)] {
            let batch = printed(&format!("key {length} --format {format} --count {count}"));
            let mut keys = decode_batch(format, &batch);
            assert!(keys.iter().all(|key| key.len() == length), "{format}");
            keys.sort();
            keys.dedup();
            assert_eq!(keys.len(), count, "{format}");
        }
    }
    assert_eq!(printed("key 32").body.len(), 32, "raw is the default");
    assert_ne!(printed("key 32").body, printed("key 32").body);
}

#[test]
fn passwords_have_the_formats_of_http() {
    let daemon = Daemon::start(&[]);
    for (alphabet, known) in [
        ("digits", "0123456789"),
        ("hex", "0123456789abcdef"),
        ("unambiguous", "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"),
    ] {
        let text = printed(&format!("password 40 --alphabet {alphabet}")).text();
        let password = text.strip_suffix('\n').unwrap();
        assert!(password.len() == 40 && password.chars().all(|c| known.contains(c)), "{text}");
    }
    let json = printed("password 24 --format json --alphabet ascii");
    let response = daemon.get("/password/24?format=json&alphabet=ascii");
    assert_eq!(json.body.len(), response.body.len());
    assert_eq!(json.json()["entropy_bits"], response.json()["entropy_bits"]);
    assert_eq!(printed("password 12 --count 30").text().lines().count(), 30);
    assert_eq!(printed("password 24").text().len(), 25);
}

#[test]
fn wrong_values_are_refused_with_the_sentences_of_http() {
    let daemon = Daemon::start(&[]);
    for (kind, length, options) in [
        ("key", "0", ""),
        ("key", "032", ""),
        ("key", "1e2", ""),
        ("key", "+16", ""),
        ("key", "-1", ""),
        ("key", "1.5", ""),
        ("key", "abc", ""),
        ("key", "1025", ""),
        ("key", "99999999999999999999999", ""),
        ("key", "32", "count=3"),
        ("key", "100", "format=hex&count=1000"),
        ("key", "32", "format=hex&count=0"),
        ("key", "32", "format=hex&count=-1"),
        ("key", "32", "format=hex&count=03"),
        ("key", "32", "format=hex&count=1025"),
        ("password", "0", ""),
        ("password", "1025", ""),
        ("password", "100", "count=1000"),
    ] {
        let detail = daemon.get(&format!("/{kind}/{length}?{options}")).problem();
        let arguments: String = options
            .split('&')
            .filter(|option| !option.is_empty())
            .map(|option| format!(" --{}", option.replace('=', " ")))
            .collect();
        let output = run(&format!("{kind} {length}{arguments}"));
        assert_eq!(
            (output.status.code(), &*output.stdout),
            (Some(2), &b""[..]),
            "{kind} {length}{arguments}"
        );
        assert_eq!(error(&output), format!("error: {detail}\n"), "{length}{arguments}");
    }
    for wrong in [
        "key",
        "key ",
        "key 32 --format text",
        "password 24 --format hex",
        "password 24 --alphabet klingon",
        "key 32 33",
    ] {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn max_size_is_the_limit_of_a_key() {
    assert_eq!(printed("key 1024").body.len(), 1024);
    assert_eq!(printed("key 1025 --max-size 1025").body.len(), 1025);
    assert!(error(&run("key 17 --max-size 16")).contains("Length exceeds maximum size of 16"));
    assert_eq!(run("key 16 --max-size 1073741825").status.code(), Some(2), "the limit of the setting");
}

#[test]
fn no_setting_is_read() {
    let mut command = command("key 32");
    // The daemon would refuse each of these.
    command.env("KEYSERVICE_MAX_SIZE", "1k").env("KEYSERVICE_NONE", "1").env("NOTIFY_SOCKET", "/nowhere");
    assert_eq!(run_to_end(command).stdout.len(), 32);
    for (arguments, option) in [
        ("--max-size 64 key 32", "--max-size"),
        ("--config /nowhere password 24", "--config"),
        ("--check key 32", "--check"),
        ("key 32 --config /nowhere", "--config"),
        ("key 32 --check", "--check"),
        ("password 24 --srv-port 1", "--srv-port"),
        ("password 24 --max-size 1", "--max-size"),
    ] {
        let output = run(arguments);
        assert_eq!((output.status.code(), &*output.stdout), (Some(2), &b""[..]), "{arguments}");
        assert!(error(&output).contains(option), "{arguments}: {}", error(&output));
    }
}

#[test]
fn help_has_examples_and_no_setting() {
    for command in ["key", "password"] {
        let help = printed(&format!("{command} --help")).text();
        let (options, examples) = help.split_once("\nExamples:\n").unwrap();
        assert!(!options.contains("--host") && !options.contains("--config"), "{help}");
        let examples: Vec<_> =
            examples.lines().filter_map(|line| line.strip_prefix("  key-service ")).collect();
        assert!(examples.len() >= 3, "{help}");
        for example in examples {
            let directory = TempDirectory::new();
            let mut command = key_service(&directory);
            command.args(example.split(' ')).current_dir(directory.file("."));
            assert!(run_to_end(command).status.success(), "{example}");
        }
    }
}

#[test]
fn the_examples_of_the_manual_work() {
    let manual = include_str!("../packaging/man/key-service.8").replace("\\-", "-");
    let (_, examples) = manual.split_once(".SH EXAMPLES\n").unwrap();
    let (examples, _) = examples.split_once(".SH ").unwrap();
    let scripts: Vec<_> =
        examples.split(".EX\n").skip(1).map(|rest| rest.split_once(".EE\n").unwrap().0).collect();
    assert_eq!(scripts.len(), 2, "{examples}");
    let directory = TempDirectory::new();
    let script = format!("set -e; PATH=${{1%/*}}:$PATH\n{}exec true", scripts.concat());
    let output = run_in_shell(&script, &directory.file("."), "");
    assert_eq!((output.status.code(), error(&output)), (Some(0), ""));
    // Two lines of od(1), three keys and a password.
    assert_eq!(output.stdout.split(|byte| *byte == b'\n').count(), 7);
}

/// A terminal: the end that reads what programs print, and the end that they print to.
fn terminal() -> (File, File) {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap();
    let terminal = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (controller.into(), terminal.into())
}

#[test]
fn a_terminal_gets_text_and_no_raw_bytes() {
    let (mut reader, terminal) = terminal();
    let output = run_into("key 32", terminal.try_clone().unwrap());
    assert_eq!(output.status.code(), Some(2));
    for hint in ["found a terminal", "--format hex", "a pipe", "--output FILE"] {
        assert!(error(&output).contains(hint), "{}", error(&output));
    }
    assert!(run_into("key 32 --format hex", terminal).status.success());
    let mut printed = [0; 66];
    reader.read_exact(&mut printed).unwrap();
    assert!(printed.ends_with(b"\r\n"), "the first bytes on the terminal are those of the hexadecimal key");
    common::formats::decode_hex(str::from_utf8(&printed[..64]).unwrap());
}

#[test]
fn a_closed_pipe_and_a_full_device_fail() {
    for arguments in
        ["key 32", "key 32 --format json --count 3", "key 1000000 --max-size 1000000", "password 24"]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_failed(&run_into(arguments, writer), "failed to write to standard output: Broken pipe");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_failed(&run_into(arguments, full), "failed to write to standard output: No space left");
        let unwritable = File::open("/dev/null").unwrap();
        assert_failed(&run_into(arguments, unwritable), "failed to write to standard output: Bad file");
    }
    // Standard error may be full as well.
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = command("key 32");
    command.stdout(full()).stderr(full());
    assert_eq!(Process::spawn(command).wait().code(), Some(1));
    let output = run_into("token new --name a", full());
    assert_failed(&output, "failed to write to standard output: No space left");
}

/// Runs a script for `sh` in which `"$@"` is `key-service` with these arguments.
fn run_in_shell(script: &str, directory: &Path, arguments: &str) -> Output {
    let mut command = shell(script);
    command.arg(binary()).args(arguments.split(' ')).current_dir(directory);
    run_to_end(command)
}

#[test]
fn a_file_size_limit_leaves_no_part_of_a_key() {
    let directory = TempDirectory::new();
    let root = directory.file(".");
    // 512 bytes, as sh(1) counts.
    for (script, former) in [
        ("ulimit -f 1; exec \"$@\" >file", ""),
        ("ulimit -f 1; exec \"$@\" >>file", "former\n"),
        ("ulimit -f 1; exec \"$@\" 1<>file", "former\n"),
    ] {
        fs::write(directory.file("file"), former).unwrap();
        let output = run_in_shell(script, &root, "key 1000");
        assert_failed(&output, "bytes for the size of a file (ulimit -f), found 512");
        assert_eq!(fs::read_to_string(directory.file("file")).unwrap(), former, "{script}");
        assert!(run_in_shell(script, &root, "key 500").status.success(), "{script}");
    }
    fs::remove_file(directory.file("file")).unwrap();
    let output = run_in_shell("ulimit -f 1; exec \"$@\"", &root, "key 1000 --output file");
    assert_failed(&output, "(ulimit -f), found 512");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

#[test]
fn standard_output_may_be_appended_to_a_file() {
    let directory = TempDirectory::new();
    let script = "\"$@\" >>file && exec \"$@\" >>file";
    assert!(run_in_shell(script, &directory.file("."), "key 16 --format hex").status.success());
    let text = fs::read_to_string(directory.file("file")).unwrap();
    assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [32, 32]);
}

#[test]
fn a_new_file_is_complete_and_private() {
    let directory = TempDirectory::new();
    let root = directory.file(".");
    for umask in ["000", "022", "077", "777"] {
        for (arguments, size) in
            [("key 32", 32), ("key 3000000 --max-size 3000000", 3_000_000), ("password 24", 25)]
        {
            let script = format!("umask {umask}; exec \"$@\"");
            let output = run_in_shell(&script, &root, &format!("{arguments} --output file"));
            assert!(
                output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
                "{output:?}"
            );
            let found = fs::symlink_metadata(directory.file("file")).unwrap();
            assert_eq!(
                (found.len(), found.permissions().mode(), found.nlink()),
                (size, 0o100_600, 1),
                "{umask}"
            );
            fs::remove_file(directory.file("file")).unwrap();
            assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "no other file is left");
        }
    }
    assert_eq!(run_in_shell("exec \"$@\"", &root, "key 32 --output -").stdout.len(), 32);
}

#[test]
fn no_existing_file_is_replaced_or_followed() {
    let directory = TempDirectory::new();
    let root = directory.file(".");
    directory.write("file", "former\n");
    symlink("nowhere", directory.file("link")).unwrap();
    fs::create_dir(directory.file("directory")).unwrap();
    for name in ["file", "link", "directory"] {
        let output = run_in_shell("exec \"$@\"", &root, &format!("key 7 --output {name}"));
        assert_failed(&output, &format!("failed to write to {name}: it exists already"));
    }
    for name in ["nowhere/file", "..", "file/file", ""] {
        let output = run_in_shell("exec \"$@\"", &root, &format!("key 7 --output {name}"));
        assert!(
            matches!(output.status.code(), Some(1 | 2)) && output.stdout.is_empty(),
            "{name}: {output:?}"
        );
    }
    assert_eq!(fs::read_to_string(directory.file("file")).unwrap(), "former\n");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 3);
}

#[test]
fn a_complete_file_is_kept_on_request() {
    let directory = TempDirectory::new();
    let root = directory.file(".");
    let run = |arguments: &str| run_in_shell("exec \"$@\"", &root, arguments);
    let arguments = "key 32 --format hex --output file --keep-existing";
    assert!(run(arguments).status.success());
    let key = fs::read(directory.file("file")).unwrap();
    assert!(key.len() == 65 && run(arguments).status.success());
    assert_eq!(fs::read(directory.file("file")).unwrap(), key);
    assert_failed(
        &run("key 32 --output file --keep-existing"),
        "expected a file of 32 bytes: found 65 bytes",
    );
    symlink("file", directory.file("link")).unwrap();
    let output = run("key 32 --format hex --output link --keep-existing");
    assert_failed(&output, "found no regular file");
    assert_eq!(run("key 32 --keep-existing").status.code(), Some(2), "without a file");
}

/// The process's file that has no name, once it has some bytes.
fn unnamed_size(process: &Process) -> Option<u64> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid())).ok()?;
    descriptors
        .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
        .find(|file| file.is_file() && file.nlink() == 0)
        .map(|file| file.len())
}

#[test]
fn a_killed_command_leaves_no_file() {
    let directory = TempDirectory::new();
    let root = directory.file(".");
    // Elsewhere the file has a temporary name.
    let has_unnamed_files = openat(CWD, &root, OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR).is_ok();
    for signal in ["KILL", "TERM", "INT", "HUP"] {
        let mut command = command("key 1073741824 --max-size 1073741824 --format hex --output file");
        command.current_dir(&root);
        let mut process = Process::spawn(command);
        if has_unnamed_files {
            until("a part of the key", || unnamed_size(&process).filter(|size| *size > MIB));
        }
        process.signal(signal);
        assert!(!process.wait().success());
        assert!(!directory.file("file").exists(), "{signal}");
        if has_unnamed_files {
            assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "{signal}");
        }
    }
}

#[test]
fn a_large_key_takes_little_memory_and_leaves_no_core_dump() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = command("key 1073741824 --max-size 1073741824 --format base64");
    command.stdout(writer);
    let process = Process::spawn(command);
    let mut read = vec![0; usize::try_from(8 * MIB).unwrap()];
    reader.read_exact(&mut read).unwrap();
    let file = |name| fs::read_to_string(format!("/proc/{}/{name}", process.pid())).unwrap();
    let (limits, status) = (file("limits"), file("status"));
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["1", "1"]);
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")).unwrap();
    assert!(peak.parse::<u64>().unwrap() * 1024 < 16 * MIB, "{peak} kB");
}

#[test]
fn the_offset_of_a_shared_file_is_where_the_output_ends() {
    let directory = TempDirectory::new();
    let mut file =
        File::options().read(true).write(true).create_new(true).open(directory.file("file")).unwrap();
    assert!(run_into("key 32", file.try_clone().unwrap()).status.success());
    assert_eq!(file.stream_position().unwrap(), 32);
}
