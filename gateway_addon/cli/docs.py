"""`gateway docs`: the handbook, from the pages that come with the package."""

from importlib import resources

import click

from gateway_addon.names import PROGRAM

PAGES = resources.files("gateway_addon") / "docs"


@click.command(epilog=f"Example: {PROGRAM} docs policy")
@click.argument("topic", default="index")
def docs(topic: str) -> None:
    """Show a chapter of the handbook, or the list of its chapters: in a pager on a terminal, else plainly."""
    topics = sorted(page.name.removesuffix(".md") for page in PAGES.iterdir() if page.name.endswith(".md"))
    if topic not in topics:
        raise click.UsageError(f"The handbook has no chapter {topic!r}; its chapters: {', '.join(topics)}.")
    click.echo_via_pager((PAGES / f"{topic}.md").read_text(encoding="utf-8").removesuffix("\n"))
