//! W13: bugs that are planted, each of which its scenario must catch.

use crate::Result;
use crate::findings::Findings;
use crate::planted::{self, meaningless, run_all};
use crate::stage::{Backend, Stage};

/// Plants every bug that there can be on this back end, again and again until the time is over.
pub async fn run(stage: &Stage) -> Result<Findings> {
    let backend = match stage.backend {
        Backend::Redis => planted::Backend::RedisPostgres,
        Backend::Memory => planted::Backend::MemorySqlite,
    };
    for (bug, why) in meaningless(backend) {
        println!("  not on {}: {bug}: {why}", backend.name());
    }
    let (mut findings, mut planted, mut caught) = (Findings::default(), 0, 0);
    let begun = std::time::Instant::now();
    while planted == 0 || begun.elapsed() < stage.time {
        for finding in run_all(backend).await {
            println!("  {}: {}", finding.bug, finding.evidence);
            planted += 1;
            caught += u64::from(finding.caught);
            findings.ok += u64::from(finding.clean);
            if !finding.caught {
                findings.violation(format!("{}: not caught; {}", finding.bug, finding.evidence));
            }
            if !finding.clean {
                findings.violation(format!("{}: refused; {}", finding.bug, finding.evidence));
            }
        }
    }
    findings.bites = caught;
    findings.figures.extend([("planted", planted), ("caught", caught)]);
    Ok(findings)
}
