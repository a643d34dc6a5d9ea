// A page that is read from file:// may not start a worker. The search's worker runs in a hidden frame there.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame.contentWindow
      this.frame.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => this.load(each)), Promise.resolve())
      this.loaded = this.load(url)
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.document.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.frame.document.body.appendChild(script)
      })
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.frameElement.remove()
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker
}
