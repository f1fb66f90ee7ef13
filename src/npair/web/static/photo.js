// Turns the file that a person gives into one that the server takes.

// What the server takes.
const BYTES = 20_000_000;
const PIXELS = 64_000_000;

// Of a photo drawn again. The side is far more than the network sees.
const SIDE = 2048;
const QUALITY = 0.92;

// By the first bytes, since names lie.
const FORMATS = [
  ["JPEG", /^\xff\xd8\xff/],
  ["PNG", /^\x89PNG\r\n\x1a\n/],
  ["WebP", /^RIFF[^]{4}WEBP/],
  ["GIF", /^GIF8/],
  ["AVIF", /^[^]{4}ftypavi[fs]/],
  ["HEIC", /^[^]{4}ftyp(hei|hev|mif1|msf1)/],
  ["BMP", /^BM/],
  ["TIFF", /^(II\*\0|MM\0\*)/],
];
const TAKEN = ["JPEG", "PNG", "WebP"];

/** The file is no photo, or none that this browser can open. The message is for people. */
export class PhotoError extends Error {}

/**
 * Return what to send for a file of this name, and a note of what was changed, or "".
 *
 * A JPEG, PNG or WebP within the limits stays as it is. Others are drawn upright, at most SIDE
 * pixels long, on white, as a JPEG.
 * Throws PhotoError.
 */
export async function prepare(file, name) {
  if (file.size === 0) throw new PhotoError(`${name} is empty.`);
  const format = await formatOf(file).catch(() => {
    throw new PhotoError(`${name} cannot be read. If it is a folder, choose a photo inside it.`);
  });
  const image = await decode(file);
  const { naturalWidth: width = 0, naturalHeight: height = 0 } = image ?? {};
  const fits = file.size <= BYTES && width * height <= PIXELS;
  // The server judges what this browser cannot open, and says what is wrong with it.
  if (TAKEN.includes(format) && fits) return { photo: file, note: "" };
  if (width * height === 0) {
    const kind = format ? `, a ${format} file` : "";
    throw new PhotoError(
      `Your browser cannot open ${name}${kind}. Save it as a JPEG, PNG or WebP, and try again.`,
    );
  }
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const size = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const photo = await draw(image, ...size);
  if (!photo) {
    throw new PhotoError(
      `Your browser cannot scale ${name}. Make it smaller than ${PIXELS / 1e6} megapixels and` +
        ` ${BYTES / 1e6} MB, and try again.`,
    );
  }
  const converted = TAKEN.includes(format) ? "" : `Sent as JPEG, made of a ${format ?? "picture"}.`;
  const reduced = scale < 1 ? `Scaled from ${width} × ${height} to ${size.join(" × ")}.` : "";
  return { photo, note: [converted, reduced].filter(Boolean).join(" ") };
}

async function formatOf(file) {
  const head = new Uint8Array(await file.slice(0, 16).arrayBuffer());
  const text = String.fromCharCode(...head);
  return FORMATS.find(([, start]) => start.test(text))?.[0];
}

/** Return the picture with its orientation applied, or null if this browser cannot open it. */
async function decode(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function draw(image, width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff"; // as the server does with transparency
  pen.fillRect(0, 0, width, height);
  pen.drawImage(image, 0, 0, width, height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
}
