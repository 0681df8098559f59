// Lets the search work in pages that are opened from the disk, where browsers start no worker: its script runs in a
// hidden frame instead, and messages go to and fro as events.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      const script = document.createElement("script");
      frame.hidden = true;
      document.documentElement.append(frame);
      this.inside = frame.contentWindow;
      this.loaded = new Promise((resolve) => (script.onload = resolve));
      this.inside.postMessage = (sent) => {
        const event = new MessageEvent("message", { data: structuredClone(sent) });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      this.terminate = () => frame.remove();
      script.src = new URL(url, location.href).href;
      this.inside.document.head.append(script);
    }
    postMessage(sent) {
      const { inside } = this;
      const data = structuredClone(sent); // as a thread gets it
      const deliver = () => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      this.loaded.then(() => setTimeout(deliver)); // as from a thread: never before what is under way has ended
    }
  };
}
