// Upload a file with tus-js-client: node tus.cjs URL FILE STORAGE PROTOCOL
// It goes on where an earlier process has stopped, which it knows from the storage.
const fs = require("node:fs");
const path = require("node:path");
const tus = require("tus-js-client");

const [endpoint, file, storage, protocol] = process.argv.slice(2);
const filename = path.basename(file);

const options =
  protocol === "tus-v1"
    ? { metadata: { filename } }
    : { headers: { "Content-Disposition": `attachment; filename="${filename}"` } };
// Of the last part of a file that is resumed as a stream, tus-js-client 4.3 says Upload-Complete: ?0.
const source = protocol === "tus-v1" ? fs.createReadStream(file) : fs.readFileSync(file);

const upload = new tus.Upload(source, {
  ...options,
  endpoint,
  protocol,
  urlStorage: new tus.FileUrlStorage(storage),
  retryDelays: Array(300).fill(200),
  onError(error) {
    console.error(String(error));
    process.exit(1);
  },
  onSuccess() {
    process.exit(0);
  },
});

upload.findPreviousUploads().then((previous) => {
  if (previous.length > 0) upload.resumeFromPreviousUpload(previous[0]);
  upload.start();
});
