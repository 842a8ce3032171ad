"""Does every link of a built site lead somewhere, and does no page ask another machine for anything?"""
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('source', 'src')}   # what a browser fetches by itself
STYLES = ('stylesheet', 'preconnect', 'preload', 'icon')


class Page(HTMLParser):
    "The anchors of a page, its links, and what it loads."
    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ('id', 'name') if attrs.get(name)}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        self.loads += [attrs[name] for kind, name in LOADED if tag == kind and attrs.get(name)]
        if tag == 'link' and attrs.get('rel') in STYLES: self.loads.append(attrs['href'])


def check_site(site):
    "(faults, number of links) of the html files below the folder `site`."
    pages = {file.resolve(): Page(file.read_text(encoding='utf-8')) for file in sorted(Path(site).rglob('*.html'))}
    faults, links = [], 0
    for file, page in pages.items():
        name = file.relative_to(Path(site).resolve())
        faults += [f'{name}: loads {url}' for url in page.loads if urlsplit(url).netloc]
        for link in {*page.links, *page.loads}:
            url = urlsplit(link)
            if url.scheme or url.netloc or name.name == '404.html': continue   # it is shown at any address
            links += 1
            target = file if not url.path else (file.parent/unquote(url.path)).resolve()
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): faults.append(f'{name}: {link} is not there')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                faults.append(f'{name}: {link} has no such anchor')
    return faults, links
