//! Lists that come in pages: fetches page after page, and prints what follows the last one.
//!
//! Also owns the options that listings share.

use super::follow::After;
use super::output::{Listed, Listing, Printer, write};

/// Items requested at once.
const PAGE: u32 = 1000;
/// Rows of a table, unless the user asks for another number.
const ROWS: usize = 1000;

/// Which container a listing is about.
#[derive(Debug, clap::Args)]
pub(super) struct OfContainer {
    /// Only of this container: its whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    #[arg(short, long, value_name = "CONTAINER")]
    container: Option<String>,
}

impl OfContainer {
    /// Empty for all containers.
    pub(super) fn to_proto(&self) -> String {
        self.container.clone().unwrap_or_default()
    }
}

/// Which part of a long list is printed.
#[derive(Debug, clap::Args)]
pub(super) struct Part {
    /// With --follow: only what comes after this cursor (0: everything kept), or `latest`
    #[arg(long, value_name = "CURSOR", requires = "follow", default_value = "0")]
    pub(super) after: After,
    /// Print at most this many, the newest (0: all) [default: 1000 in a table, all otherwise]
    #[arg(long, value_name = "NUMBER")]
    limit: Option<usize>,
    /// Start after an earlier page, with the token that it ended with
    #[arg(long, value_name = "TOKEN")]
    page: Option<String>,
}

/// One page of a reply.
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// The token of the next page; empty on the last one.
    pub(super) next: String,
}

/// Converts the items of a page, as they came from the daemon.
pub(super) fn page<M, T, E>(
    items: Vec<M>,
    next: String,
    convert: impl FnMut(M) -> Result<T, E>,
) -> anyhow::Result<Page<T>>
where
    anyhow::Error: From<E>,
{
    let items = items.into_iter().map(convert).collect::<Result<_, E>>()?;
    Ok(Page { items, next })
}

/// Fetches pages until the last one, or until `limit` items have come. `fetch` receives the
/// size and the token of a page. Returns the token of the page that would come next.
pub(super) async fn fetch_pages<T>(
    first: String,
    limit: usize,
    mut fetch: impl AsyncFnMut(u32, String) -> anyhow::Result<Page<T>>,
    mut each: impl FnMut(Vec<T>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let (mut token, mut count) = (first, 0);
    loop {
        let left = limit.saturating_sub(count);
        let size = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
        let page = fetch(size, token).await?;
        count += page.items.len();
        each(page.items)?;
        token = page.next;
        if token.is_empty() || count >= limit {
            return Ok(token);
        }
    }
}

/// Fetches all pages.
pub(super) async fn fetch_all<T>(
    fetch: impl AsyncFnMut(u32, String) -> anyhow::Result<Page<T>>,
) -> anyhow::Result<Vec<T>> {
    let mut all = Vec::new();
    let keep = |page: Vec<T>| {
        all.extend(page);
        Ok(())
    };
    fetch_pages(String::new(), usize::MAX, fetch, keep).await?;
    Ok(all)
}

/// Prints a list page by page as the pages come, and a hint to what is not printed. Returns
/// how many items were printed.
pub(super) async fn print_pages<T: Listed>(
    listing: &Listing,
    part: &Part,
    if_empty: &str,
    fetch: impl AsyncFnMut(u32, String) -> anyhow::Result<Page<T>>,
) -> anyhow::Result<usize> {
    let limit = match part.limit {
        Some(0) => usize::MAX,
        Some(limit) => limit,
        None if listing.is_for_people() => ROWS,
        None => usize::MAX,
    };
    let first = part.page.clone().unwrap_or_default();
    let mut printer = Printer::new(listing);
    let more = fetch_pages(first, limit, fetch, |items| printer.page(&items)).await?;
    let printed = printer.printed;
    printer.end::<T>()?;
    if !more.is_empty() {
        hint_at_more(listing, printed, &more)?;
    }
    listing.note_if_empty(printed, if_empty);
    Ok(printed)
}

fn hint_at_more(listing: &Listing, printed: usize, token: &str) -> anyhow::Result<()> {
    let hint = format!(
        "… the newest {printed} are shown, and there are more: --limit NUMBER shows more, \
         --limit 0 all, --page {token} the next ones\n"
    );
    if listing.is_for_people() {
        // The last line of the table.
        write(hint.as_bytes())?;
    } else if listing.output.is_for_people() {
        eprint!("{hint}");
    } else {
        eprintln!("there are more (go on with: --page {token})");
    }
    Ok(())
}
