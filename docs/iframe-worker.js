/* Search where the site is opened from a disk: browsers start no workers there, so a hidden frame does what one would. */
(() => {
  if (location.protocol !== "file:") return;
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const load = (one) => new Promise((loaded, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        script.src = new URL(one, location.href);
        script.onload = loaded;
        script.onerror = failed;
        this.frame.contentDocument.head.append(script);
      });
      this.ready = new Promise((loaded) => { this.frame.onload = loaded; }).then(() => {
        const inner = this.frame.contentWindow;
        inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        inner.importScripts = async (...urls) => { for (const one of urls) await load(one); };
        return load(url);
      });
      this.frame.srcdoc = "<!doctype html><title></title>";
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() => {
        const inner = this.frame.contentWindow;
        inner.dispatchEvent(new inner.MessageEvent("message", { data }));
      });
    }
    terminate() { this.frame.remove(); }
  }
  window.Worker = window.IFrameWorker = IFrameWorker;
})();
