//! The modules of `src` import only downwards, and no two of them import each other, directly or by way of others. No
//! dependency is there that none of them uses.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The layers, from the top. A file may import those below its own, and other files of its own layer.
const LAYERS: [&[&str]; 8] = [
    &["cli", "probe", "daemon"],
    &["config"],
    &["systemd"],
    &["http"],
    &["server"],
    &["access"],
    &["telemetry"],
    &["keys"],
];

/// The most lines that a file may have before its tests.
const LINES_MAX: usize = 450;

/// Files of `src` by their paths, such as `keys/key.rs`.
type Sources = BTreeMap<String, String>;

#[test]
fn imports_run_downwards_without_cycles() {
    let sources = sources();
    assert!(sources.len() > 40, "the source was read: {} files", sources.len());
    let imports: usize = sources.keys().map(|path| imports(&sources, path).len()).sum();
    assert!(imports > 150, "its imports were found: {imports}");
    assert_eq!(violations(&sources), [""; 0]);
}

#[test]
fn no_file_is_long() {
    let is_long = |text: &str| without_tests(text).lines().count() > LINES_MAX;
    let long: Vec<_> =
        sources().into_iter().filter(|(_, text)| is_long(text)).map(|(path, _)| path).collect();
    assert_eq!(long, [""; 0], "more than {LINES_MAX} lines before the tests");
}

#[test]
fn no_two_types_share_a_name() {
    let mut files = BTreeMap::<String, Vec<String>>::new();
    for (path, text) in sources() {
        for line in without_tests(&text).lines().filter(|line| line.trim_start().starts_with("pub")) {
            let mut words =
                line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
            if words.any(|word| ["struct", "enum", "trait", "type"].contains(&word)) {
                files.entry(words.next().unwrap().to_owned()).or_default().push(path.clone());
            }
        }
    }
    assert!(files.len() > 100, "the types were found: {}", files.len());
    files.retain(|_, files| files.len() > 1);
    assert_eq!(files, BTreeMap::new());
}

#[test]
fn every_dependency_is_used() {
    let source: String = sources().into_values().collect();
    let manifest = include_str!("../Cargo.toml");
    let (_, dependencies) = manifest.split_once("\n[dependencies]\n").unwrap();
    let (dependencies, _) = dependencies.split_once("\n[").unwrap();
    let names: Vec<_> =
        dependencies.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name).collect();
    assert!(names.contains(&"tokio"), "the dependencies were found: {names:?}");
    let is_used = |name: &str| {
        let name = name.replace('-', "_");
        ["::", "!"].iter().any(|end| source.contains(&format!("{name}{end}")))
    };
    let unused: Vec<_> = names.into_iter().filter(|name| !is_used(name)).collect();
    assert_eq!(unused, [""; 0]);
}

#[test]
fn every_directory_says_what_it_may_import() {
    for (path, text) in sources().iter().filter(|(path, _)| path.ends_with("/mod.rs")) {
        assert!(text.starts_with("//! "), "{path} has no documentation");
        if path.matches('/').count() == 1 {
            assert!(text.contains("//! May import: "), "{path} does not say what it may import");
        }
    }
}

#[test]
fn an_upward_import_and_a_cycle_are_found() {
    let mut sources = Sources::from([
        ("keys/mod.rs".into(), "pub mod key;".into()),
        ("keys/key.rs".into(), "use std::fmt;".into()),
        ("http/mod.rs".into(), "pub mod body;\npub mod service;".into()),
        ("http/body.rs".into(), "use crate::keys::key::Key;".into()),
        ("http/service.rs".into(), "use crate::{http::body::{self, Body}, keys::key};".into()),
    ]);
    assert_eq!(violations(&sources), [""; 0]);
    assert_eq!(
        imports(&sources, "http/service.rs"),
        ["http/body.rs", "keys/key.rs"].map(String::from).into()
    );
    sources.insert("keys/key.rs".into(), "use crate::http::body;".into());
    assert_eq!(
        violations(&sources),
        [
            "cycle: http/body.rs -> keys/key.rs -> http/body.rs",
            "keys/key.rs imports http/body.rs, a layer above"
        ]
    );
    sources.insert("keys/key.rs".into(), "#[cfg(test)]\nmod tests {\n    use crate::http::body;\n}".into());
    assert_eq!(violations(&sources), [""; 0], "tests may import what they need");
    for import in [
        "use super::service::A;",
        "fn f() { crate::http::service::g(); }",
        "use crate::http::{x, service::*};",
    ] {
        sources.insert("http/body.rs".into(), import.into());
        assert_eq!(
            violations(&sources),
            ["cycle: http/body.rs -> http/service.rs -> http/body.rs"],
            "{import}"
        );
    }
    sources.insert("http/body.rs".into(), "use crate::unknown::A;".into());
    assert_eq!(violations(&sources), ["http/body.rs imports crate::unknown, which has no file"]);
}

fn sources() -> Sources {
    fn read(directory: &Path, prefix: &str, sources: &mut Sources) {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                read(&entry.path(), &format!("{name}/"), sources);
            } else if name.ends_with(".rs") && !["main.rs", "lib.rs"].contains(&name.as_str()) {
                sources.insert(name, fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    let mut sources = Sources::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut sources);
    sources
}

/// What is wrong with the imports of `sources`, one sentence each.
fn violations(sources: &Sources) -> Vec<String> {
    let mut found = BTreeSet::new();
    let mut graph = BTreeMap::new();
    for path in sources.keys() {
        let imports = imports(sources, path);
        for import in &imports {
            if import.starts_with("crate::") {
                found.insert(format!("{path} imports {import}, which has no file"));
            } else if layer(import) < layer(path) {
                found.insert(format!("{path} imports {import}, a layer above"));
            }
        }
        graph.insert(path.clone(), imports);
    }
    found.extend(sources.keys().filter_map(|path| cycle(&graph, path)));
    found.into_iter().collect()
}

/// The place of a file's layer, counted from the top.
fn layer(path: &str) -> usize {
    let top = path.split('/').next().unwrap().trim_end_matches(".rs");
    LAYERS.iter().position(|layer| layer.contains(&top)).unwrap_or_else(|| panic!("{path} is in no layer"))
}

/// The shortest cycle through `start`, told from its first file by name, so that each is told once.
fn cycle(graph: &BTreeMap<String, BTreeSet<String>>, start: &str) -> Option<String> {
    let mut paths = vec![vec![start]];
    let mut seen = BTreeSet::new();
    while !paths.is_empty() {
        let mut longer = Vec::new();
        for path in paths {
            for next in graph.get(*path.last().unwrap()).into_iter().flatten() {
                if next == start {
                    let is_first = path.iter().all(|file| start <= *file);
                    return is_first.then(|| format!("cycle: {} -> {start}", path.join(" -> ")));
                }
                if seen.insert(next) {
                    longer.push([path.clone(), vec![next]].concat());
                }
            }
        }
        paths = longer;
    }
    None
}

/// The files that the file at `path` names by `crate::`, `self::` or `super::` outside of its tests.
fn imports(sources: &Sources, path: &str) -> BTreeSet<String> {
    let directory = path
        .strip_suffix("mod.rs")
        .map_or_else(|| path.trim_end_matches(".rs"), |path| path.trim_end_matches('/'));
    let own: Vec<_> = directory.split('/').collect();
    let mut names = Vec::new();
    for line in without_tests(&sources[path]).split_inclusive(';') {
        let code: String =
            line.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join(" ");
        match code.trim().trim_start_matches("pub ").strip_prefix("use ") {
            Some(tree) => expand(tree.trim_end_matches(';').trim(), "", &mut names),
            None => names.extend(qualified(&code)),
        }
    }
    let resolved = names.iter().filter_map(|name| {
        let mut parts: Vec<_> = name.split("::").map(str::trim).collect();
        match parts[0] {
            "crate" => _ = parts.remove(0),
            "self" => _ = parts.splice(..1, own.iter().copied()),
            "super" => _ = parts.splice(..1, own[..own.len() - 1].iter().copied()),
            _ => return None,
        }
        let file = |length: usize| {
            let stem = parts.get(..length)?.join("/");
            [format!("{stem}.rs"), format!("{stem}/mod.rs")]
                .into_iter()
                .find(|file| sources.contains_key(file))
        };
        Some(
            (1..=parts.len())
                .rev()
                .find_map(file)
                .unwrap_or_else(|| format!("crate::{}", parts.join("::").split("::").next().unwrap())),
        )
    });
    resolved.filter(|file| file != path).collect()
}

/// The paths in the tree of a `use`, without what is behind `as`.
fn expand(tree: &str, prefix: &str, names: &mut Vec<String>) {
    let Some((head, rest)) = tree.split_once('{') else {
        let name = tree.split(" as ").next().unwrap().trim();
        return names.push(
            format!("{prefix}{}", name.trim_end_matches("::self")).trim_end_matches("::self").to_owned(),
        );
    };
    let prefix = format!("{prefix}{}", head.trim());
    let (mut depth, mut part) = (0, String::new());
    for character in rest[..rest.rfind('}').unwrap()].chars() {
        match character {
            ',' if depth == 0 => expand(&std::mem::take(&mut part), &prefix, names),
            _ => {
                depth += i32::from(character == '{') - i32::from(character == '}');
                part.push(character);
            }
        }
    }
    if !part.trim().is_empty() {
        expand(&part, &prefix, names);
    }
}

/// Paths in code that begin with `crate::` or `super::`.
fn qualified(code: &str) -> Vec<String> {
    let is_of_path = |character: char| character.is_alphanumeric() || "_:".contains(character);
    let mut names = Vec::new();
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            if !code[..at].ends_with(is_of_path) {
                names.push(
                    code[at..]
                        .split(|character| !is_of_path(character))
                        .next()
                        .unwrap()
                        .trim_end_matches(':')
                        .to_owned(),
                );
            }
        }
    }
    names
}

fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap()
}
