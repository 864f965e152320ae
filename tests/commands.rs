//! The commands in the documents can be pasted into an interactive zsh and into any sh. None stores an error message as
//! if it were a key, and none shows a token to other users.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_documented_command_can_be_pasted() {
    let mut problems = Vec::new();
    let mut scripts = 0;
    for file in documents(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        let text = fs::read_to_string(&file).unwrap();
        for (line, script) in scripts_of(&file, &text) {
            scripts += 1;
            let location =
                format!("{}:{line}", file.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display());
            problems.extend(problems_of(&script).into_iter().map(|problem| format!("{location}: {problem}")));
        }
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
    assert!(scripts > 80, "expected more than 80 scripts in the documents, found {scripts}");
}

#[test]
fn the_readme_installs_curl_before_it_uses_it() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (before, _) = readme.split_once("\ncurl ").unwrap();
    assert!(before.contains("apt install curl"), "{before}");
}

#[test]
fn commands_that_break_when_pasted_are_detected() {
    for (script, problem) in [
        ("curl -f http://a/key/32 # a key", "comment"),
        ("# on the host\ntrue", "comment"),
        ("curl http://a/key/32?format=hex", "quote"),
        ("curl \"http://a/b\" http://a/key/*", "quote"),
        ("helm install a --set b[0]=c", "quote"),
        ("curl 'http://a/b?c=1'&d=2", "background"),
        ("curl -s http://a/key/32 | od", "curl -f"),
        ("curl -so key http://a/key/32", "curl -f"),
        ("curl -s --output key http://a/key/32", "curl -f"),
        ("sudo curl -sO http://a/key/32", "curl -f"),
        ("umask 077; curl -s http://a/key/32 >key", "curl -f"),
        ("key=$(curl -s http://a/key/32)", "curl -f"),
        ("echo \"the key: $(curl -s http://a/key/32)\"", "curl -f"),
        ("(umask 077\ncurl -o key \\\n  http://a/key/32)", "curl -f"),
        ("curl -H \"Authorization: Bearer $TOKEN\" http://a/", "token"),
        ("curl -u a:b http://a/", "token"),
        ("curl --oauth2-bearer $TOKEN http://a/", "token"),
        ("wget --header=\"Authorization: Bearer $TOKEN\" http://a/", "token"),
        ("curl -f http://a/key/32 | xxd", "xxd"),
    ] {
        let found = problems_of(script);
        assert!(found.iter().any(|found| found.contains(problem)), "{script}: {problem}: {found:?}");
    }
    for script in [
        "curl http://a/health",
        "curl -sS -m 5 http://$HOST:1123/health; df -h",
        "curl -fsS 'http://a/key/32?format=hex&count=2' >keys",
        "(umask 077; curl -fo key http://a/key/32)",
        "test -s key || curl --fail -o key http://a/key/32",
        "curl -f http://a/key/32 | od -An -tx1 2>/dev/null",
        "curl -s http://a/health >/dev/null",
        "curl -fH @token.header http://a/key/32 >key",
        "printf 'Authorization: Bearer %s\\n' \"$TOKEN\" >token.header",
        "cat >a.conf <<'EOF'\n# a comment of the file [x]\nEOF\ncat a.conf",
        "kubectl get secret -o jsonpath='{.data.tls\\.crt}' | grep -E '^(a|b)[0-9]?#'",
        "sudo cp helm-chart/files/*.yml /etc/prometheus/ && [ -e a#b ]",
        "for d in /var/* /tmp; do echo \"$(find $d -xdev 2>/dev/null | wc -l) $d\"; done | sort",
    ] {
        assert_eq!(problems_of(script), Vec::<String>::new(), "{script}");
    }
}

/// Markdown, the chart's notes and manual pages.
fn documents(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // .git and other hidden files, build results, and packages that the chart's tests install.
        let is_excluded = name.starts_with('.') || ["target", "node_modules", "corpus"].contains(&name);
        if path.is_dir() && !is_excluded {
            found.extend(documents(&path));
        } else if [".md", "NOTES.txt", ".5", ".8"].iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
    found
}

/// The scripts of a document, each with the number of the line before it.
fn scripts_of(file: &Path, text: &str) -> Vec<(usize, String)> {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("md") => fenced(text).into_iter().chain(inline(text)).collect(),
        Some("txt") => indented(text),
        _ => examples(text),
    }
}

/// Fenced blocks of Markdown in the language of a shell, or without a language but with a shell command.
fn fenced(text: &str) -> Vec<(usize, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, &str, usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (None, Some(language)) => {
                open = Some((number + 1, language, line.len() - line.trim_start().len(), String::new()));
            }
            (Some((_, _, indent, script)), None) => {
                let blanks = line.len() - line.trim_start().len();
                script.push_str(&line[blanks.min(*indent)..]);
                script.push('\n');
            }
            (Some(_), Some(_)) => {
                let (number, language, _, script) = open.take().unwrap();
                let is_shell = ["sh", "bash", "zsh", "shell", "console"].contains(&language.trim());
                if is_shell || (language.is_empty() && has_command(&script)) {
                    blocks.push((number, script));
                }
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "unclosed block: {open:?}");
    blocks
}

/// curl commands within a sentence of Markdown.
fn inline(text: &str) -> Vec<(usize, String)> {
    let marked = |(number, line): (usize, &str)| {
        let spans: Vec<_> =
            line.split('`').skip(1).step_by(2).map(|span| (number + 1, span.to_owned())).collect();
        spans.into_iter().filter(|(_, span)| span.starts_with("curl ") && span.contains("://"))
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("```"))
        .flat_map(marked)
        .collect()
}

/// Indented lines of the chart's notes, with 1 for each value that Helm inserts.
fn indented(text: &str) -> Vec<(usize, String)> {
    let commands = text.lines().enumerate().filter(|(_, line)| line.starts_with("  "));
    commands
        .map(|(number, line)| {
            let script = line.split("{{").map(|part| part.split_once("}}").map_or(part, |(_, rest)| rest));
            (number + 1, script.collect::<Vec<_>>().join("1").trim().to_owned())
        })
        .collect()
}

/// Examples of a manual page that contain a command.
fn examples(text: &str) -> Vec<(usize, String)> {
    let lines: Vec<_> = text.lines().collect();
    let starts = (0..lines.len()).filter(|number| lines[*number] == ".EX");
    let example = |start: usize| {
        let body = lines[start + 1..].iter().take_while(|line| **line != ".EE");
        let script: String =
            body.map(|line| format!("{}\n", line.replace("\\-", "-").replace("\\(dq", "\""))).collect();
        (start + 1, script)
    };
    starts.map(example).filter(|(_, script)| has_command(script)).collect()
}

fn has_command(script: &str) -> bool {
    ["curl ", "sudo ", "systemctl ", "key-service ", "wg "]
        .iter()
        .any(|command| script.lines().any(|line| line.starts_with(command)))
}

/// The problems of a script, each described in a sentence.
fn problems_of(script: &str) -> Vec<String> {
    let mut shell = Shell { rest: script, problems: Vec::new(), here: Vec::new() };
    shell.parse(false, false);
    shell.problems
}

/// A word of a command: its text without quotes, and its characters that a shell would expand to file names.
#[derive(Default)]
struct Word {
    text: String,
    globs: String,
}

/// Parses scripts of sh(1), as far as the documents use its syntax.
struct Shell<'a> {
    rest: &'a str,
    problems: Vec<String>,
    /// The delimiters of here-documents whose text begins on the next line.
    here: Vec<String>,
}

impl Shell<'_> {
    /// Parses commands up to the end or the closing parenthesis. `is_captured`: their output is stored in a variable.
    fn parse(&mut self, in_parentheses: bool, is_captured: bool) {
        let mut words: Vec<Word> = Vec::new();
        let mut is_stored = is_captured;
        while let Some(next) = self.rest.chars().next() {
            let next_two = self.rest.get(..2).unwrap_or_default();
            match next {
                ' ' | '\t' => self.skip(1),
                '\\' if next_two == "\\\n" => self.skip(2),
                '#' => {
                    let comment = self.rest.lines().next().unwrap_or_default();
                    self.problems.push(format!("interactive zsh has no comments: {comment}"));
                    self.skip(comment.len());
                }
                '\n' | ';' | '|' | '&' | ')' => {
                    self.skip(if ["||", "&&", ";;"].contains(&next_two) { 2 } else { 1 });
                    if next == '&' && next_two != "&&" {
                        self.problems.push("& runs a command in the background: quote it".into());
                    }
                    self.check(&words, is_stored || (next == '|' && next_two != "||"));
                    (words, is_stored) = (Vec::new(), is_captured);
                    match next {
                        '\n' => self.skip_here_documents(),
                        ')' if in_parentheses => return,
                        _ => {}
                    }
                }
                '(' => {
                    self.skip(1);
                    self.parse(true, is_captured);
                }
                '<' | '>' => {
                    let descriptor = words.last().map_or("", |word| &word.text).to_owned();
                    let is_descriptor = ["1", "2"].contains(&&*descriptor);
                    is_stored |= self.redirect(next) && descriptor != "2";
                    if is_descriptor {
                        words.pop();
                    }
                }
                _ => words.push(self.word()),
            }
        }
        self.check(&words, is_stored);
    }

    /// Parses a redirection, and returns whether it stores output in a file.
    fn redirect(&mut self, direction: char) -> bool {
        let is_here = self.rest.starts_with("<<");
        self.rest = self.rest.trim_start_matches([direction, '&', '-']).trim_start_matches(' ');
        let target = self.word().text;
        if is_here {
            self.here.push(target);
            return false;
        }
        direction == '>' && target != "/dev/null" && target.parse::<u32>().is_err()
    }

    fn skip(&mut self, count: usize) {
        self.rest = &self.rest[count..];
    }

    fn skip_here_documents(&mut self) {
        for delimiter in std::mem::take(&mut self.here) {
            while !self.rest.is_empty() {
                let line = self.rest.split_inclusive('\n').next().unwrap();
                self.skip(line.len());
                if line.trim_end() == delimiter {
                    break;
                }
            }
        }
    }

    fn word(&mut self) -> Word {
        let mut word = Word::default();
        while let Some(next) = self.rest.chars().next() {
            if self.rest.starts_with("$(") {
                self.skip(2);
                self.parse(true, true);
                continue;
            }
            match next {
                ' ' | '\t' | '\n' | ';' | '|' | '&' | '<' | '>' | '(' | ')' => break,
                '\\' => {
                    self.skip(1);
                    word.text.extend(self.rest.chars().next().filter(|escaped| *escaped != '\n'));
                    self.skip(self.rest.chars().next().map_or(0, char::len_utf8));
                }
                '\'' => {
                    self.skip(1);
                    let end = self.rest.find('\'').expect("a closing quotation mark");
                    word.text.push_str(&self.rest[..end]);
                    self.skip(end + 1);
                }
                '"' => self.quotation(&mut word),
                _ => {
                    word.text.push(next);
                    word.globs.extend(['?', '*', '[', ']'].contains(&next).then_some(next));
                    self.skip(next.len_utf8());
                }
            }
        }
        word
    }

    fn quotation(&mut self, word: &mut Word) {
        self.skip(1);
        loop {
            let next = self.rest.chars().next().expect("a closing quotation mark");
            if self.rest.starts_with("$(") {
                self.skip(2);
                self.parse(true, true);
                continue;
            }
            self.skip(next.len_utf8());
            match next {
                '"' => return,
                '\\' => {
                    word.text.extend(self.rest.chars().next());
                    self.skip(1);
                }
                _ => word.text.push(next),
            }
        }
    }

    /// Checks one command.
    fn check(&mut self, words: &[Word], is_stored: bool) {
        for word in words {
            let is_url = word.text.contains("://");
            let is_glob = word.globs.contains(['?', '[']) && !["[", "[[", "]", "]]"].contains(&&*word.text);
            if is_glob || (is_url && !word.globs.is_empty()) {
                self.problems.push(format!("quote {}: zsh expands it to file names", word.text));
            }
        }
        let prefixes = ["sudo", "do", "then", "else", "if", "while", "until", "!", "time", "env"];
        let is_prefix = |word: &&Word| {
            let name = word.text.split_once('=').map_or("", |(name, _)| name);
            prefixes.contains(&&*word.text)
                || (!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        };
        let mut words = words.iter().skip_while(is_prefix).map(|word| &*word.text);
        let Some(program) = words.next() else { return };
        let arguments: Vec<_> = words.collect();
        let holds_token = |word: &&str| {
            let lower = word.to_lowercase();
            lower.contains("authorization:") || lower.contains("bearer ")
        };
        let passes_secret = |word: &&str| ["-u", "--user", "--oauth2-bearer"].contains(word);
        // A builtin runs in the shell's process, so other users can't see its arguments.
        let is_builtin = ["printf", "echo"].contains(&program);
        if !is_builtin
            && (arguments.iter().any(holds_token)
                || (program == "curl" && arguments.iter().any(passes_secret)))
        {
            self.problems.push(format!(
                "every user can read a token in the arguments of {program}: use curl -H @FILE"
            ));
        }
        if program == "xxd" {
            self.problems.push("a minimal Debian has no xxd: use od or format=hex".into());
        }
        if program == "curl" {
            let short: Vec<_> = arguments.iter().filter_map(|word| letters(word)).collect();
            let has = |letter: char, long: &str| {
                short.iter().any(|letters| letters.contains(letter))
                    || arguments.iter().any(|word| word.starts_with(long))
            };
            let is_stored = is_stored || has('o', "--output") || has('O', "--remote-name");
            if is_stored && !has('f', "--fail") {
                self.problems.push(format!(
                    "an error message would be stored as if it were a key: use curl -f {arguments:?}"
                ));
            }
        }
    }
}

/// The short options in an argument of curl, up to one that takes a value.
fn letters(argument: &str) -> Option<&str> {
    let letters = argument.strip_prefix('-').filter(|rest| !rest.starts_with('-'))?;
    let end = letters
        .find(['H', 'm', 'o', 'd', 'u', 'X', 'A', 'K', 'w', 'E', 'T'])
        .map_or(letters.len(), |at| at + 1);
    Some(&letters[..end])
}
