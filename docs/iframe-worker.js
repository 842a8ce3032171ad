// A browser starts no worker on a page from a disk: there the search runs in a hidden frame of the page.
if (location.protocol === "file:") window.Worker = class {
  constructor(url) {
    this.frame = document.createElement("iframe")
    this.frame.hidden = true
    document.documentElement.append(this.frame)
    const inner = this.frame.contentWindow
    // written, so that the browser does not put an empty page in its place later
    inner.document.open()
    inner.document.write("<!doctype html><body></body>")
    inner.document.close()
    inner.postMessage = data => this.onmessage?.(new MessageEvent("message", {data}))
    const script = inner.document.createElement("script")
    this.ready = new Promise(resolve => { script.onload = () => resolve(inner) })
    script.onerror = error => this.onerror?.(error)
    script.src = new URL(url, location)
    inner.document.body.append(script)
  }
  postMessage(data) { this.ready.then(inner => inner.onmessage({data})) }
  terminate() { this.frame.remove() }
}
