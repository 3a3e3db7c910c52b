//! Counts of the reliability goals: small in every test run, as large as `scripts/goals.py` asks for there.

/// The size that an environment variable asks for.
pub fn size(variable: &str, default: usize) -> usize {
    let asked = std::env::var(variable).ok();
    asked.map_or(default, |text| text.parse().expect("a goal's size is a number"))
}

/// One line that the script reads.
#[expect(clippy::print_stdout, reason = "it is what the script reads")]
pub fn report(row: u32, counts: &[(&str, usize)]) {
    let counts: Vec<_> = counts.iter().map(|(name, count)| format!("{name}={count}")).collect();
    println!("\ngoal {row} {}", counts.join(" "));
}
